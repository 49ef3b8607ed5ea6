# Made by `cq completions bash`; run it again after installing plugs.
_cq() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local command=${COMP_WORDS[1]} words= files=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='analyze completions merge plugins quant run template verify --help --version'
  else
    case $command:$before in
      analyze:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      analyze:--scaling) words='tensor row block' ;;
      analyze:--optimizer) words='quip rtn' ;;
      analyze:--rotate) words='auto off 256 64 16' ;;
      analyze:--family) words='auto none anima boogu chroma chroma-radiance clip cosmos2 ernie flux1 flux2 hidream hunyuan-video ideogram4 krea2 llm ltx2 ltxv lumina2 minimax-h3 qwen-image sd15 sd3 sdxl t5 wan z-image distillation_large distillation_small gemma4 generic_text hunyuan lens ltxv2 minimaxh3 mistral nerf_large nerf_small qwen qwen35 qwen_vlm radiance t5xxl visual zimage zimage_refiner' ;;
      analyze:--recipe) words= files=1 ;;
      analyze:--only) words= ;;
      analyze:--skip) words= ;;
      analyze:--among) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      analyze:--metric) words='sqnr cosine mse outliers' ;;
      analyze:--sort) words='name size' ;;
      analyze:--report) words= files=1 ;;
      analyze:--workers) words= ;;
      analyze:--memory-limit) words= ;;
      analyze:--plugin) words= files=1 ;;
      completions:--plugin) words= files=1 ;;
      merge:--scale) words= ;;
      merge:--output|merge:-o) words= files=1 ;;
      merge:--workers) words= ;;
      merge:--memory-limit) words= ;;
      merge:--plugin) words= files=1 ;;
      plugins:--plugin) words= files=1 ;;
      quant:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      quant:--scaling) words='tensor row block' ;;
      quant:--optimizer) words='quip rtn' ;;
      quant:--rotate) words='auto off 256 64 16' ;;
      quant:--family) words='auto none anima boogu chroma chroma-radiance clip cosmos2 ernie flux1 flux2 hidream hunyuan-video ideogram4 krea2 llm ltx2 ltxv lumina2 minimax-h3 qwen-image sd15 sd3 sdxl t5 wan z-image distillation_large distillation_small gemma4 generic_text hunyuan lens ltxv2 minimaxh3 mistral nerf_large nerf_small qwen qwen35 qwen_vlm radiance t5xxl visual zimage zimage_refiner' ;;
      quant:--recipe) words= files=1 ;;
      quant:--only) words= ;;
      quant:--skip) words= ;;
      quant:--output|quant:-o) words= files=1 ;;
      quant:--workers) words= ;;
      quant:--memory-limit) words= ;;
      quant:--plugin) words= files=1 ;;
      run:--output|run:-o) words= files=1 ;;
      run:--workers) words= ;;
      run:--memory-limit) words= ;;
      run:--plugin) words= files=1 ;;
      template:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      template:--scaling) words='tensor row block' ;;
      template:--optimizer) words='quip rtn' ;;
      template:--rotate) words='auto off 256 64 16' ;;
      template:--family) words='auto none anima boogu chroma chroma-radiance clip cosmos2 ernie flux1 flux2 hidream hunyuan-video ideogram4 krea2 llm ltx2 ltxv lumina2 minimax-h3 qwen-image sd15 sd3 sdxl t5 wan z-image distillation_large distillation_small gemma4 generic_text hunyuan lens ltxv2 minimaxh3 mistral nerf_large nerf_small qwen qwen35 qwen_vlm radiance t5xxl visual zimage zimage_refiner' ;;
      template:--recipe) words= files=1 ;;
      template:--only) words= ;;
      template:--skip) words= ;;
      template:--budget) words= ;;
      template:--min-sqnr) words= ;;
      template:--among) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      template:--workers) words= ;;
      template:--memory-limit) words= ;;
      template:--output|template:-o) words= files=1 ;;
      template:--plugin) words= files=1 ;;
      verify:--against) words= files=1 ;;
      verify:--min-sqnr) words= ;;
      verify:--max-error) words= ;;
      verify:--workers) words= ;;
      verify:--memory-limit) words= ;;
      verify:--plugin) words= files=1 ;;
      *) case $command in
        analyze) words='--format --scaling --optimizer --rotate --family --recipe --only --skip --allow-custom-loader --deep --among --metric --sort --report --force --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        completions) words='bash zsh fish --plugin --quiet -q --debug --help' ;;
        merge) words='--scale --dampen --no-dampen --allow-unmatched --output -o --force --restart --dry-run --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        plugins) words='--json --plugin --quiet -q --debug --help' ;;
        quant) words='--format --scaling --optimizer --rotate --no-scale-search --scale-search --family --recipe --only --skip --requantize --allow-custom-loader --save-quant-metadata --output -o --defer --force --restart --dry-run --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        run) words='--output -o --force --restart --dry-run --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        template) words='--format --scaling --optimizer --rotate --family --recipe --only --skip --allow-custom-loader --budget --min-sqnr --among --workers --memory-limit --output -o --force --plugin --quiet -q --debug --help' files=1 ;;
        verify) words='--against --min-sqnr --max-error --header-only --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ -n "$files" ] && [ "${word#-}" = "$word" ] && COMPREPLY+=($(compgen -f -- "$word"))
}
complete -o filenames -F _cq cq
