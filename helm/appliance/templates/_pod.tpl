{{/* The pods: (list root component), component server (also a group's leader) or worker. */}}

{{- define "appliance.podTemplate" -}}
{{- $root := index . 0 }}
{{- $component := index . 1 }}
{{- $values := $root.Values -}}
metadata:
  labels:
    {{- include "appliance.podLabels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "appliance.podBasics" $root | nindent 2 }}
  serviceAccountName: {{ include "appliance.serviceAccountName" $root }}
  terminationGracePeriodSeconds: {{ include "appliance.graceSeconds" $root }}
  {{- include "appliance.placement" (list $root $values.resources $component) | trim | nindent 2 }}
  containers:
    - name: {{ $component }}
      {{- include "appliance.containerBasics" $root | nindent 6 }}
      args: [serve]
      env:
        {{- include "appliance.env" $root | nindent 8 }}
      {{- with $values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: http
          containerPort: 8000
      {{- include "appliance.probes" $root | nindent 6 }}
      {{- if $values.preStopSeconds }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ $values.preStopSeconds }}
      {{- end }}
      resources:
        {{- toYaml $values.resources | nindent 8 }}
      volumeMounts:
        {{- include "appliance.mounts" $root | nindent 8 }}
        {{- if include "appliance.shmSize" $root }}
        - name: shm
          mountPath: /dev/shm
        {{- end }}
        {{- if $values.tls.existingSecret }}
        - name: tls
          mountPath: /etc/appliance/tls
          readOnly: true
        {{- end }}
  volumes:
    {{- include "appliance.volumes" $root | trim | nindent 4 }}
    {{- with include "appliance.shmSize" $root }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ . }}
    {{- end }}
    {{- with $values.tls.existingSecret }}
    - name: tls
      secret:
        secretName: {{ . }}
    {{- end }}
{{- end }}

{{/* Of every pod of this chart. Service links would add APPLIANCE_… variables where a release has that name. */}}
{{- define "appliance.podBasics" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "appliance.containerBasics" -}}
image: {{ include "appliance.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.containerSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
terminationMessagePolicy: FallbackToLogsOnError
{{- end }}

{{/* Where pods run: (list root resources component); the component is empty for a pod that need not spread. */}}
{{- define "appliance.placement" -}}
{{- $root := index . 0 }}
{{- $component := index . 2 }}
{{- $values := $root.Values }}
{{- $wantsGpu := include "appliance.gpus" (dict "Values" (dict "resources" (index . 1))) | int }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerateGpu := and $values.gpuToleration (gt $wantsGpu 0) }}
{{- if or $values.tolerations $tolerateGpu }}
tolerations:
  {{- if $tolerateGpu }}
  - key: nvidia.com/gpu
    operator: Exists
    effect: NoSchedule
  {{- end }}
  {{- with $values.tolerations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- if $component }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "appliance.selectorLabels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $component }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "appliance.probes" -}}
startupProbe:
  {{- include "appliance.probe" (list . .Values.startupProbe (include "appliance.startupFailures" .)) | nindent 2 }}
livenessProbe:
  {{- include "appliance.probe" (list . .Values.livenessProbe .Values.livenessProbe.failureThreshold) | nindent 2 }}
readinessProbe:
  {{- include "appliance.probe" (list . .Values.readinessProbe .Values.readinessProbe.failureThreshold) | nindent 2 }}
{{- end }}

{{/* (list root probe failures) */}}
{{- define "appliance.probe" -}}
{{- $probe := index . 1 -}}
httpGet:
  path: {{ $probe.path }}
  port: http
  scheme: {{ include "appliance.scheme" (index . 0) }}
periodSeconds: {{ $probe.periodSeconds }}
timeoutSeconds: {{ $probe.timeoutSeconds }}
failureThreshold: {{ index . 2 }}
{{- end }}

{{/* Cache, /tmp and the user's own, of server and pre-cache Job. */}}
{{- define "appliance.mounts" -}}
- name: cache
  mountPath: /opt/nim/.cache
- name: tmp
  mountPath: /tmp
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A StatefulSet's pods have the volume "cache" from its claim template. */}}
{{- define "appliance.volumes" -}}
{{- if not .Values.persistence.enabled }}
- name: cache
  emptyDir:
    sizeLimit: {{ include "appliance.cacheSize" . }}
{{- else if ne (include "appliance.workload" .) "StatefulSet" }}
- name: cache
  persistentVolumeClaim:
    claimName: {{ include "appliance.claimName" . }}
{{- end }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmp.size }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "appliance.claimSpec" -}}
accessModes:
  {{- toYaml .Values.persistence.accessModes | nindent 2 }}
{{- with .Values.persistence.storageClass }}
storageClassName: {{ ternary "" . (eq . "-") | quote }}
{{- end }}
resources:
  requests:
    storage: {{ include "appliance.cacheSize" . }}
{{- end }}
