{{- define "penumbra.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (default .Chart.Name .Values.nameOverride) .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (default .Chart.Name .Values.nameOverride) | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What selects the pods of one component; never changes over a release's life. */}}
{{- define "penumbra.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "penumbra.labels" -}}
{{ include "penumbra.selector" . }}
app.kubernetes.io/part-of: penumbra
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A pool: its own fields over poolDefaults. Input: dict root, name. */}}
{{- define "penumbra.pool" -}}
{{- $own := index .root.Values.pools .name }}
{{- toYaml (mustMergeOverwrite (deepCopy .root.Values.poolDefaults) (deepCopy $own)) }}
{{- end }}

{{- define "penumbra.poolLabels" -}}
llm-d.ai/role: {{ .pool.role }}
llm-d.ai/model: {{ .root.Values.model.name | trunc 63 | quote }}
llm-d.ai/engine-type: penumbra
penumbra.ai/pool: {{ .name }}
{{- with .pool.contextLengthRange }}
llm-d.ai/context-length-range: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "penumbra.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ required "an image needs a tag or a digest" .tag }}{{ end }}
{{- end }}

{{- define "penumbra.modelPath" -}}
{{ printf "%s/%s" .Values.model.mountPath .Values.model.subPath | trimSuffix "/" }}
{{- end }}

{{- define "penumbra.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "penumbra.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Environment that every process of ours has. Input: the root. */}}
{{- define "penumbra.env" -}}
- {name: HOME, value: /tmp}
- name: PENUMBRA_REDIS
  value: {{ include "penumbra.redisUrl" . | quote }}
{{- with .Values.tracing.otlpTracesEndpoint }}
- {name: PENUMBRA_OTLP_TRACES_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{/* `@file` lets `--redis` read the URL, password and all, from a mounted Secret: neither the environment nor a process
     list ever shows it. */}}
{{- define "penumbra.redisUrl" -}}
{{- if .Values.redis.urlSecret }}@/run/secrets/penumbra-redis/url
{{- else if .Values.redis.url }}{{ .Values.redis.url }}
{{- else }}redis://{{ include "penumbra.fullname" . }}-redis:{{ .Values.redis.port }}/0{{ end }}
{{- end }}

{{- define "penumbra.volumeMounts" -}}
- {name: config, mountPath: /etc/penumbra, readOnly: true}
- {name: model, mountPath: {{ .Values.model.mountPath }}, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .Values.redis.urlSecret }}
- {name: redis-url, mountPath: /run/secrets/penumbra-redis, readOnly: true}
{{- end }}
{{- end }}

{{- define "penumbra.volumes" -}}
- name: config
  configMap: {name: {{ include "penumbra.fullname" . }}}
- name: tmp
  emptyDir: {}
- name: model
{{- with .Values.model.source }}
{{- if .pvc }}
  persistentVolumeClaim: {claimName: {{ .pvc }}}
{{- else if .hostPath }}
  hostPath: {path: {{ .hostPath }}, type: Directory}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
{{- with .Values.redis.urlSecret }}
- name: redis-url
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* The init container that puts the checkpoint in place, if one has to. Input: dict root, image. */}}
{{- define "penumbra.modelInit" -}}
{{- $source := .root.Values.model.source }}
{{- if or $source.generate $source.download.repository }}
- name: model
  image: {{ include "penumbra.image" .image }}
  imagePullPolicy: {{ .image.pullPolicy }}
  {{- if $source.generate }}
  args: {{ concat (list "model" "tiny" (include "penumbra.modelPath" .root)) $source.generate | toJson }}
  {{- else }}
  command: [hf]
  args: [download, {{ $source.download.repository | quote }}, --revision, {{ $source.download.revision | quote }}, --local-dir, {{ include "penumbra.modelPath" .root | quote }}]
  {{- end }}
  env:
    - {name: HOME, value: /tmp}
    {{- if and $source.download.repository $source.download.tokenSecret }}
    - {name: HF_TOKEN_PATH, value: /run/secrets/hf/HF_TOKEN}
    {{- end }}
  securityContext: {{- include "penumbra.containerSecurity" . | nindent 4 }}
  resources:
    requests: {cpu: 500m, memory: 1Gi}
    limits: {memory: 4Gi}
  volumeMounts:
    - {name: model, mountPath: {{ .root.Values.model.mountPath }}}
    - {name: tmp, mountPath: /tmp}
    {{- if and $source.download.repository $source.download.tokenSecret }}
    - {name: hf-token, mountPath: /run/secrets/hf, readOnly: true}
    {{- end }}
{{- end }}
{{- end }}

{{- define "penumbra.modelInitVolumes" -}}
{{- if and .Values.model.source.download.repository .Values.model.source.download.tokenSecret }}
- name: hf-token
  secret: {secretName: {{ .Values.model.source.download.tokenSecret }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{/* What can not be said by the schema. */}}
{{- define "penumbra.check" -}}
{{- $source := .Values.model.source }}
{{- $ways := 0 }}
{{- range list $source.hostPath $source.download.repository $source.generate }}{{ if . }}{{ $ways = add1 $ways }}{{ end }}{{ end }}
{{- if and $source.pvc (not $source.download.repository) }}{{ $ways = add1 $ways }}{{ end }}
{{- if ne (int $ways) 1 }}
{{- fail "model.source: choose exactly one of pvc, hostPath, download.repository (with or without pvc) and generate, so that every pod finds the same checkpoint" }}
{{- end }}
{{- if and (not .Values.auth.existingSecret) (not .Values.auth.insecure) }}
{{- fail "auth: name a Secret with API keys in auth.existingSecret, or set auth.insecure=true to serve everybody who reaches the router" }}
{{- end }}
{{- $redis := 0 }}
{{- range list .Values.redis.enabled .Values.redis.url .Values.redis.urlSecret }}{{ if . }}{{ $redis = add1 $redis }}{{ end }}{{ end }}
{{- if ne (int $redis) 1 }}
{{- fail "redis: choose exactly one of enabled=true, url and urlSecret" }}
{{- end }}
{{- $roles := dict }}
{{- range $name, $pool := .Values.pools }}{{ if $pool }}{{ $_ := set $roles $pool.role true }}{{ end }}{{ end }}
{{- if not (and (hasKey $roles "prefill") (hasKey $roles "decode")) }}
{{- fail "pools: there must be at least one pool of role prefill and one of role decode" }}
{{- end }}
{{- end }}
