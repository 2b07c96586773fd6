{{- /* Made by tests/chart_tools.py from appliance/backends/cuda.py: the largest sizes on GPUs. */}}
{{- define "appliance.maxTensor" -}}1{{- end }}
{{- define "appliance.maxPipeline" -}}1{{- end }}
