# Made by `cq completions bash`; run it again after installing plugs.
_cq() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local command=${COMP_WORDS[1]} words= files=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='analyze completions edit merge plugins quant run template verify --help --version'
  else
    case $command:$before in
      analyze:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      analyze:--scaling) words='tensor row block' ;;
      analyze:--optimizer) words='gptq learned quip rtn' ;;
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
      edit:--remove-keys) words= ;;
      edit:--keep-keys) words= ;;
      edit:--add-keys) words= files=1 ;;
      edit:--rename) words= ;;
      edit:--set-quant) words= ;;
      edit:--quant-filter) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      edit:--cast) words= ;;
      edit:--migrate) words= ;;
      edit:--prefer) words='markers header' ;;
      edit:--set-meta) words= ;;
      edit:--remove-meta) words= ;;
      edit:--extract-component) words= ;;
      edit:--max-shard-size) words= ;;
      edit:--output|edit:-o) words= files=1 ;;
      edit:--workers) words= ;;
      edit:--memory-limit) words= ;;
      edit:--engine) words='local ray' ;;
      edit:--plugin) words= files=1 ;;
      merge:--scale) words= ;;
      merge:--method) words='dare orthogonal sum ties' ;;
      merge:--density) words= ;;
      merge:--seed) words= ;;
      merge:--from) words= files=1 ;;
      merge:--extract) words= files=1 ;;
      merge:--rank) words= ;;
      merge:--alpha) words='tensors' ;;
      merge:--map) words= files=1 ;;
      merge:--dtype) words='bf16 fp16 fp32' ;;
      merge:--output|merge:-o) words= files=1 ;;
      merge:--max-shard-size) words= ;;
      merge:--workers) words= ;;
      merge:--memory-limit) words= ;;
      merge:--engine) words='local ray' ;;
      merge:--plugin) words= files=1 ;;
      plugins:--plugin) words= files=1 ;;
      quant:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      quant:--scaling) words='tensor row block' ;;
      quant:--optimizer) words='gptq learned quip rtn' ;;
      quant:--rotate) words='auto off 256 64 16' ;;
      quant:--family) words='auto none anima boogu chroma chroma-radiance clip cosmos2 ernie flux1 flux2 hidream hunyuan-video ideogram4 krea2 llm ltx2 ltxv lumina2 minimax-h3 qwen-image sd15 sd3 sdxl t5 wan z-image distillation_large distillation_small gemma4 generic_text hunyuan lens ltxv2 minimaxh3 mistral nerf_large nerf_small qwen qwen35 qwen_vlm radiance t5xxl visual zimage zimage_refiner' ;;
      quant:--recipe) words= files=1 ;;
      quant:--only) words= ;;
      quant:--skip) words= ;;
      quant:--calibration) words= files=1 ;;
      quant:--calibration-lora) words= files=1 ;;
      quant:--set) words= ;;
      quant:--seed) words= ;;
      quant:--bf16-compute) words='auto on off' ;;
      quant:--input-scales) words= ;;
      quant:--smoothquant) words= ;;
      quant:--output|quant:-o) words= files=1 ;;
      quant:--max-shard-size) words= ;;
      quant:--workers) words= ;;
      quant:--memory-limit) words= ;;
      quant:--engine) words='local ray' ;;
      quant:--device) words='cpu auto cuda' ;;
      quant:--streaming-mode) words='auto off minimal balanced aggressive' ;;
      quant:--quip-checkpointed-threshold) words= ;;
      quant:--quip-checkpointed-segments) words= ;;
      quant:--vram-limit) words= ;;
      quant:--plugin) words= files=1 ;;
      run:--output|run:-o) words= files=1 ;;
      run:--shard) words= ;;
      run:--max-shard-size) words= ;;
      run:--workers) words= ;;
      run:--memory-limit) words= ;;
      run:--engine) words='local ray' ;;
      run:--device) words='cpu auto cuda' ;;
      run:--streaming-mode) words='auto off minimal balanced aggressive' ;;
      run:--quip-checkpointed-threshold) words= ;;
      run:--quip-checkpointed-segments) words= ;;
      run:--vram-limit) words= ;;
      run:--plugin) words= files=1 ;;
      template:--format) words='asym_w4a8_int8 awq_w4a16 bf16 convrot_w4a4 float8_e4m3fn float8_e5m2 fp16 fp32 int8_blockwise int8_tensorwise mxfp8 nvfp4' ;;
      template:--scaling) words='tensor row block' ;;
      template:--optimizer) words='gptq learned quip rtn' ;;
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
      verify:--calibration) words= files=1 ;;
      verify:--max-output-error) words= ;;
      verify:--base) words= files=1 ;;
      verify:--fail-on) words= ;;
      verify:--images) words= files=1 ;;
      verify:--contact-sheet) words= files=1 ;;
      verify:--min-psnr) words= ;;
      verify:--comfyui) words= ;;
      verify:--workflow) words= files=1 ;;
      verify:--reference-name) words= ;;
      verify:--model-name) words= ;;
      verify:--prompts) words= files=1 ;;
      verify:--sizes) words= ;;
      verify:--batch-sizes) words= ;;
      verify:--seeds) words= ;;
      verify:--timeout) words= ;;
      verify:--report) words= files=1 ;;
      verify:--junit) words= files=1 ;;
      verify:--workers) words= ;;
      verify:--memory-limit) words= ;;
      verify:--plugin) words= files=1 ;;
      *) case $command in
        analyze) words='--format --scaling --optimizer --rotate --family --recipe --only --skip --requantize --allow-custom-loader --deep --among --metric --sort --report --force --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        completions) words='bash zsh fish --plugin --quiet -q --debug --help' ;;
        edit) words='--remove-keys --keep-keys --add-keys --replace --rename --set-quant --quant-filter --cast --migrate --prefer --save-quant-metadata --drop-quant-metadata --set-meta --remove-meta --extract-component --split-components --max-shard-size --unshard --in-place --allow-broken --output -o --force --restart --dry-run --workers --memory-limit --engine --json --plugin --quiet -q --debug --help' files=1 ;;
        merge) words='--scale --dampen --no-dampen --method --density --seed --from --extract --rank --alpha --as-comfyui --map --allow-unmatched --dtype --keep-format --explain --output -o --force --restart --max-shard-size --dry-run --workers --memory-limit --engine --json --plugin --quiet -q --debug --help' files=1 ;;
        plugins) words='--json --plugin --quiet -q --debug --help' ;;
        quant) words='--format --scaling --optimizer --rotate --no-scale-search --scale-search --family --recipe --only --skip --requantize --allow-custom-loader --save-quant-metadata --native-names --calibration --calibration-lora --set --seed --bf16-compute --input-scales --bias-correction --smoothquant --equalize --output -o --defer --force --restart --max-shard-size --dry-run --workers --memory-limit --engine --device --streaming-mode --quip-checkpointed --quip-checkpointed-threshold --quip-checkpointed-segments --vram-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        run) words='--output -o --shard --force --restart --max-shard-size --dry-run --workers --memory-limit --engine --device --streaming-mode --quip-checkpointed --quip-checkpointed-threshold --quip-checkpointed-segments --vram-limit --json --plugin --quiet -q --debug --help' files=1 ;;
        template) words='--format --scaling --optimizer --rotate --family --recipe --only --skip --requantize --allow-custom-loader --budget --min-sqnr --among --workers --memory-limit --output -o --force --plugin --quiet -q --debug --help' files=1 ;;
        verify) words='--against --min-sqnr --max-error --header-only --calibration --max-output-error --base --fail-on --images --contact-sheet --min-psnr --comfyui --workflow --reference-name --model-name --prompts --sizes --batch-sizes --seeds --timeout --report --junit --force --workers --memory-limit --json --plugin --quiet -q --debug --help' files=1 ;;
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  local IFS=$'\n'  # names of files may hold spaces
  [ -n "$files" ] && [ "${word#-}" = "$word" ] && COMPREPLY+=($(compgen -f -- "$word"))
}
complete -o filenames -F _cq cq
