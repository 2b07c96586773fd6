{{/* Names, labels, image. */}}

{{- define "appliance.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* At most 46 characters, so that the names made from it stay within 63. */}}
{{- define "appliance.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- .Values.fullnameOverride | default $full | trunc 46 | trimSuffix "-" }}
{{- end }}

{{- define "appliance.selectorLabels" -}}
app.kubernetes.io/name: {{ include "appliance.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Labels of an object: (list root component). */}}
{{- define "appliance.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ $root.Values.image.tag | default $root.Chart.AppVersion | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{ include "appliance.podLabels" . }}
{{- end }}

{{/* Labels of a pod: nothing that changes with a version alone, as that would restart pods: (list root component). */}}
{{- define "appliance.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "appliance.selectorLabels" $root }}
app.kubernetes.io/component: {{ index . 1 }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "appliance.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "appliance.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "appliance.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "appliance.claimName" -}}
{{ .Values.persistence.existingClaim | default (printf "%s-cache" (include "appliance.fullname" .)) }}
{{- end }}

{{- define "appliance.scheme" -}}
{{ ternary "HTTPS" "HTTP" (ne .Values.tls.existingSecret "") }}
{{- end }}

{{/* Deployment, StatefulSet or LeaderWorkerSet. */}}
{{- define "appliance.workload" -}}
{{- if .Values.multiNode.enabled -}}LeaderWorkerSet
{{- else if and .Values.persistence.enabled .Values.persistence.perPod -}}StatefulSet
{{- else -}}Deployment
{{- end }}
{{- end }}

{{- define "appliance.workloadApiVersion" -}}
{{ ternary "leaderworkerset.x-k8s.io/v1" "apps/v1" .Values.multiNode.enabled }}
{{- end }}

{{/* A number or text as an environment variable holds it: 1048576, not 1.048576e+06. */}}
{{- define "appliance.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ int64 . }}{{- else -}}{{ . }}{{- end }}
{{- end }}
