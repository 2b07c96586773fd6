{{/* What is computed from other values: GPUs, time to start and to end, sizes. */}}

{{/* GPUs of one pod: nvidia.com/gpu and MIG slices among the limits. */}}
{{- define "appliance.gpus" -}}
{{- $count := 0 }}
{{- range $name, $value := (.Values.resources).limits }}
{{- if or (eq $name "nvidia.com/gpu") (hasPrefix "nvidia.com/mig-" $name) }}
{{- $count = add $count (int $value) }}
{{- end }}
{{- end }}
{{- $count }}
{{- end }}

{{/* Pipeline stages of one pod. */}}
{{- define "appliance.stagesOfPod" -}}
{{- $pipeline := max (int .Values.parallel.pipeline) 1 }}
{{- ternary (max (div $pipeline (int .Values.multiNode.size)) 1) $pipeline .Values.multiNode.enabled }}
{{- end }}

{{/* Tensor-parallel size; 0: the profile's. */}}
{{- define "appliance.tensor" -}}
{{- $all := max (div (include "appliance.gpus" . | int) (include "appliance.stagesOfPod" . | int)) 1 }}
{{- .Values.parallel.tensor | int | default (ternary $all 0 .Values.multiNode.enabled) }}
{{- end }}

{{/* The most pods that can be there at once. */}}
{{- define "appliance.maxPods" -}}
{{- $replicas := int .Values.replicaCount }}
{{- if .Values.autoscaling.enabled }}{{ $replicas = int .Values.autoscaling.maxReplicas }}{{ end }}
{{- mul $replicas (ternary (int .Values.multiNode.size) 1 .Values.multiNode.enabled) }}
{{- end }}

{{/* Failures of the startup probe that are allowed. */}}
{{- define "appliance.startupFailures" -}}
{{- $period := int .Values.startupProbe.periodSeconds }}
{{- $budget := 1800 }}
{{- if .Values.model.sizeGiB }}
{{- $budget = addf .Values.startup.baseSeconds (mulf .Values.model.sizeGiB .Values.startup.secondsPerGiB) | ceil | int }}
{{- end }}
{{- .Values.startupProbe.failureThreshold | int | default (div (add $budget $period -1) $period) }}
{{- end }}

{{/* Seconds that a start may take. */}}
{{- define "appliance.startupSeconds" -}}
{{ mul (include "appliance.startupFailures" . | int) (int .Values.startupProbe.periodSeconds) }}
{{- end }}

{{/* After the drain the server closes connections and ends its engine: 20 s are ample. */}}
{{- define "appliance.leastGraceSeconds" -}}
{{ addf .Values.preStopSeconds .Values.drainSeconds 20 | ceil | int }}
{{- end }}

{{- define "appliance.graceSeconds" -}}
{{ .Values.terminationGracePeriodSeconds | int | default (include "appliance.leastGraceSeconds" . | int) }}
{{- end }}

{{- define "appliance.cacheSize" -}}
{{- $computed := "100Gi" }}
{{- if .Values.model.sizeGiB }}
{{- $computed = printf "%dGi" (addf 10 (mulf 2.5 .Values.model.sizeGiB) | ceil | int) }}
{{- end }}
{{- .Values.persistence.size | default $computed }}
{{- end }}

{{/* Empty where the runtime's own /dev/shm will do. */}}
{{- define "appliance.shmSize" -}}
{{- $gpus := include "appliance.gpus" . | int }}
{{- .Values.shm.size | default (ternary (printf "%dGi" $gpus) "" (gt $gpus 1)) }}
{{- end }}

{{/* One claim that only one pod (or one node) can mount. */}}
{{- define "appliance.singleWriter" -}}
{{- $p := .Values.persistence }}
{{- if and $p.enabled (not $p.perPod) (not (has "ReadWriteMany" $p.accessModes)) -}}true{{- end }}
{{- end }}
