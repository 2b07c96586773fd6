{{- /* Made by tests/chart_tools.py from appliance/backends/cuda.py: the largest sizes on GPUs. */}}
{{- define "appliance.maxTensor" -}}8{{- end }}
{{- define "appliance.maxPipeline" -}}8{{- end }}
