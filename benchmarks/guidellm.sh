#!/usr/bin/env bash
# Loads a running service with guidellm (https://github.com/vllm-project/guidellm; 0.8.1 was run) and keeps its report.
#
#   URL=http://127.0.0.1:8000 PROCESSOR=models/chat-8m OUT=runs/guidellm bash benchmarks/guidellm.sh
#
# guidellm has requirements of its own: install it into a virtual environment beside the project's and put that on PATH.
#   RATE=1,8,32        requests in flight, one run each
#   REQUESTS=64        requests a run
#   PROMPT_TOKENS=128 REPLY_TOKENS=128
set -euo pipefail

URL=${URL:-http://127.0.0.1:8000}
PROCESSOR=${PROCESSOR:?the folder of the served model, whose tokenizer cuts the prompts}
OUT=${OUT:-runs/guidellm}
RATE=${RATE:-1,8,32}
REQUESTS=${REQUESTS:-64}
PROMPT_TOKENS=${PROMPT_TOKENS:-128}
REPLY_TOKENS=${REPLY_TOKENS:-128}

command -v guidellm >/dev/null || { echo "guidellm is not on the PATH; install it into an environment of its own" >&2; exit 2; }
mkdir -p "$OUT"
guidellm run \
  --backend "kind=openai_http,target=$URL,request_format=/v1/completions" \
  --profile "kind=concurrent,streams=1" \
  --override profile.streams "$RATE" \
  --constraint "kind=max_requests,count=$REQUESTS" \
  --tokenizer "kind=hf_auto,model=$PROCESSOR" \
  --data "kind=synthetic_text,prompt_tokens=$PROMPT_TOKENS,output_tokens=$REPLY_TOKENS" \
  --output "kind=json,path=$OUT/guidellm.json" \
  --output "kind=html,path=$OUT/guidellm.html" \
  --disable-console-interactive
