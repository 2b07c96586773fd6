{{/* The environment of the containers. */}}

{{/* What every command of the appliance needs: model, cache, tokens. */}}
{{- define "appliance.modelEnv" -}}
- name: APPLIANCE_CACHE
  value: /opt/nim/.cache
- name: APPLIANCE_MODEL
  value: {{ .Values.model.name | quote }}
{{- with .Values.model.existingSecret }}
- name: APPLIANCE_HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.model.existingSecretKey }}
{{- end }}
{{- end }}

{{/* What decides which engine is served. */}}
{{- define "appliance.engineEnv" -}}
{{- $gpus := include "appliance.gpus" . | int }}
{{- $pipeline := .Values.parallel.pipeline | int }}
{{- $tensor := include "appliance.tensor" . | int }}
{{- with .Values.model.engineSource }}
- name: APPLIANCE_ENGINE_SOURCE
  value: {{ . | quote }}
{{- end }}
{{- if .Values.multiNode.enabled }}
- name: APPLIANCE_NNODES
  value: {{ .Values.multiNode.size | quote }}
{{- end }}
{{- if $tensor }}
- name: APPLIANCE_TP_SIZE
  value: {{ $tensor | quote }}
{{- end }}
{{- if $pipeline }}
- name: APPLIANCE_PP_SIZE
  value: {{ $pipeline | quote }}
{{- end }}
{{- $settings := .Values.settings }}
{{- if and (gt $gpus 0) (not (hasKey $settings "require_gpu")) }}
{{- $settings = merge (dict "require_gpu" true) $settings }}
{{- end }}
{{- range $name, $value := $settings }}
- name: APPLIANCE_{{ upper $name }}
  value: {{ include "appliance.text" $value | quote }}
{{- end }}
{{- end }}

{{/* What only a server needs. */}}
{{- define "appliance.serverEnv" -}}
- name: APPLIANCE_PORT
  value: "8000"
- name: APPLIANCE_DRAIN_SECONDS
  value: {{ include "appliance.text" .Values.drainSeconds | quote }}
{{- with .Values.model.servedNames }}
- name: APPLIANCE_SERVED_MODEL_NAME
  value: {{ join "," . | quote }}
{{- end }}
{{- if .Values.model.offline }}
- name: APPLIANCE_OFFLINE
  value: "true"
{{- end }}
{{- if .Values.auth.existingSecret }}
{{ include "appliance.apiKeysEnv" . }}
{{- end }}
{{- if .Values.tls.existingSecret }}
- name: APPLIANCE_SSL_MODE
  value: TLS
- name: APPLIANCE_SSL_CERTS_PATH
  value: /etc/appliance/tls/tls.crt
- name: APPLIANCE_SSL_KEY_PATH
  value: /etc/appliance/tls/tls.key
{{- end }}
{{- end }}

{{- define "appliance.apiKeysEnv" -}}
- name: APPLIANCE_API_KEYS
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.existingSecret }}
      key: {{ .Values.auth.existingSecretKey }}
{{- end }}

{{/* Which node of its group a pod is. The LWS_ variables come from the LeaderWorkerSet controller, before all others. */}}
{{- define "appliance.nodeEnv" -}}
- name: APPLIANCE_NODE_RANK
  value: $(LWS_WORKER_INDEX)
- name: APPLIANCE_MASTER_ADDR
  value: $(LWS_LEADER_ADDRESS)
- name: APPLIANCE_MASTER_PORT
  value: {{ .Values.multiNode.rendezvousPort | quote }}
{{- end }}

{{/* The whole list of the server's container. */}}
{{- define "appliance.env" -}}
{{ include "appliance.modelEnv" . }}
{{- with include "appliance.engineEnv" . | trim }}
{{ . }}
{{- end }}
{{ include "appliance.serverEnv" . }}
{{- if .Values.multiNode.enabled }}
{{ include "appliance.nodeEnv" . }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}
