{{/* Values that are fine one by one and wrong together: each ends with what is wrong and what to do. */}}

{{- define "appliance.check" -}}
{{- include "appliance.checkEnv" . }}
{{- include "appliance.checkAutoscaling" . }}
{{- include "appliance.checkStorage" . }}
{{- include "appliance.checkGpus" . }}
{{- include "appliance.checkPreCache" . }}
{{- include "appliance.checkRoutes" . }}
{{- $grace := include "appliance.graceSeconds" . | int }}
{{- $least := include "appliance.leastGraceSeconds" . | int }}
{{- if lt $grace $least }}
{{- fail (printf "terminationGracePeriodSeconds is %d, but preStopSeconds and drainSeconds need %d: leave it at 0, or lower drainSeconds" $grace $least) }}
{{- end }}
{{- end }}

{{/* Variables that values of this chart set, with every name the appliance takes for them. */}}
{{- define "appliance.ownVariables" -}}
model.name: [APPLIANCE_MODEL, NIM_MODEL_PATH, NIM_MODEL_NAME]
model.servedNames: [APPLIANCE_SERVED_MODEL_NAME, NIM_SERVED_MODEL_NAME]
model.engineSource: [APPLIANCE_ENGINE_SOURCE]
model.offline: [APPLIANCE_OFFLINE, NIM_DISABLE_MODEL_DOWNLOAD, HF_HUB_OFFLINE]
model.existingSecret: [APPLIANCE_HF_TOKEN, HF_TOKEN]
extraVolumes: [APPLIANCE_CACHE, APPLIANCE_CACHE_PATH, NIM_CACHE_PATH]
parallel.tensor: [APPLIANCE_TP_SIZE, NIM_TENSOR_PARALLEL_SIZE]
parallel.pipeline: [APPLIANCE_PP_SIZE, NIM_PIPELINE_PARALLEL_SIZE]
service.port: [APPLIANCE_PORT, NIM_SERVER_PORT, APPLIANCE_HEALTH_PORT, NIM_HEALTH_PORT]
auth.existingSecret: [APPLIANCE_API_KEYS]
drainSeconds: [APPLIANCE_DRAIN_SECONDS]
tls.existingSecret: [APPLIANCE_SSL_MODE, NIM_SSL_MODE, APPLIANCE_SSL_CERTS_PATH, NIM_SSL_CERTS_PATH, APPLIANCE_SSL_KEY_PATH, NIM_SSL_KEY_PATH, APPLIANCE_SSL_CA_CERTS_PATH, NIM_SSL_CA_CERTS_PATH]
multiNode.size: [APPLIANCE_NNODES, NNODES, GROUP_WORLD_SIZE, NIM_NUM_COMPUTE_NODES]
multiNode.enabled: [APPLIANCE_NODE_RANK, NODE_RANK, GROUP_RANK, NIM_NODE_RANK, APPLIANCE_MASTER_ADDR, MASTER_ADDR]
multiNode.rendezvousPort: [APPLIANCE_MASTER_PORT, MASTER_PORT]
{{- end }}

{{- define "appliance.checkEnv" -}}
{{- $own := include "appliance.ownVariables" . | fromYaml }}
{{- range $variable := .Values.env }}
{{- range $value, $names := $own }}
{{- if has $variable.name $names }}
{{- fail (printf "env: %s is set by this chart; use the value %s" $variable.name $value) }}
{{- end }}
{{- end }}
{{- end }}
{{- $seen := dict }}
{{- range include "appliance.env" . | fromYamlArray }}
{{- if hasKey $seen .name }}
{{- fail (printf "env: %s is set twice; say it in settings or in env, once" .name) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- end }}
{{- end }}

{{- define "appliance.checkStorage" -}}
{{- $p := .Values.persistence }}
{{- $pods := include "appliance.maxPods" . | int }}
{{- if and (include "appliance.singleWriter" .) (gt $pods 1) }}
{{- fail (printf "persistence: up to %d pods would share one claim with access modes %s; use accessModes [ReadWriteMany] on a storage class that has it%s" $pods (toJson $p.accessModes) (ternary "" ", or persistence.perPod: true" .Values.multiNode.enabled)) }}
{{- end }}
{{- if and $p.enabled $p.perPod $p.existingClaim }}
{{- fail "persistence: perPod makes a claim for each pod, existingClaim is one for all; choose one" }}
{{- end }}
{{- if and $p.enabled $p.perPod .Values.multiNode.enabled }}
{{- fail "persistence: perPod is not for multi-node; use one claim with accessModes [ReadWriteMany], or enabled: false" }}
{{- end }}
{{- end }}

{{- define "appliance.checkGpus" -}}
{{- $gpus := include "appliance.gpus" . | int }}
{{- range $name, $value := (.Values.resources).requests }}
{{- if and (hasPrefix "nvidia.com/" $name) (ne (toString $value) (toString (get ($.Values.resources.limits | default dict) $name))) }}
{{- fail (printf "resources: %s must be the same among limits and requests; leave it out of requests" $name) }}
{{- end }}
{{- end }}
{{- $tensor := int .Values.parallel.tensor }}
{{- $perPod := mul (max $tensor 1) (include "appliance.stagesOfPod" . | int) }}
{{- if and .Values.multiNode.enabled (mod (int .Values.parallel.pipeline) (int .Values.multiNode.size)) }}
{{- fail (printf "parallel: %d pipeline stages cannot be shared by %d pods; choose a multiple of multiNode.size, or 0" (int .Values.parallel.pipeline) (int .Values.multiNode.size)) }}
{{- end }}
{{- if and (gt $gpus 0) (gt $perPod $gpus) }}
{{- fail (printf "parallel: sizes of %d GPUs in a pod that has %d; raise resources.limits.\"nvidia.com/gpu\"%s" $perPod $gpus (ternary "" ", or use multiNode" .Values.multiNode.enabled)) }}
{{- end }}
{{- end }}

{{- define "appliance.checkAutoscaling" -}}
{{- $a := .Values.autoscaling }}
{{- if $a.enabled }}
{{- if gt (int $a.minReplicas) (int $a.maxReplicas) }}
{{- fail (printf "autoscaling: minReplicas %d is more than maxReplicas %d" (int $a.minReplicas) (int $a.maxReplicas)) }}
{{- end }}
{{- $used := 0 }}
{{- range $a.targets }}{{ if . }}{{ $used = add $used 1 }}{{ end }}{{ end }}
{{- if and (not $used) (not (and (eq $a.type "keda") $a.keda.extraTriggers)) }}
{{- fail "autoscaling: no metric has a target; set one in autoscaling.targets" }}
{{- end }}
{{- if and (eq $a.type "hpa") (lt (int $a.minReplicas) 1) }}
{{- fail "autoscaling: an HPA cannot go to zero; use minReplicas 1, or type: keda" }}
{{- end }}
{{- if and (eq $a.type "keda") $used (not $a.keda.prometheusAddress) }}
{{- fail "autoscaling: keda asks Prometheus; set autoscaling.keda.prometheusAddress" }}
{{- end }}
{{- if and (eq $a.type "keda") (lt (int $a.minReplicas) 1) (not $a.keda.extraTriggers) }}
{{- fail "autoscaling: at zero pods no metric of theirs could wake them; add a trigger that lives elsewhere (requests at the ingress, say) to autoscaling.keda.extraTriggers, or use minReplicas 1" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "appliance.checkPreCache" -}}
{{- $c := .Values.preCache }}
{{- $p := .Values.persistence }}
{{- if $c.enabled }}
{{- if or (not $p.enabled) $p.perPod }}
{{- fail "preCache: there is no claim that all pods share; use persistence.enabled: true with perPod: false" }}
{{- end }}
{{- if and $c.hook (not $p.existingClaim) }}
{{- fail "preCache: a hook runs before the chart's own claim exists; set persistence.existingClaim, or hook: false" }}
{{- end }}
{{- if and $c.profile $c.all }}
{{- fail "preCache: profile and all exclude each other; choose one" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "appliance.checkRoutes" -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.hosts) }}
{{- fail "ingress: no hosts; set ingress.hosts, for example [{host: llm.example.com}]" }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}
{{- fail "gateway: no parentRefs; name the Gateway, for example [{name: public}]" }}
{{- end }}
{{- end }}
