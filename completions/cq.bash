# Made by `cq completions bash`; run it again after installing plugs.
_cq() {
  local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}
  local command=${COMP_WORDS[1]} words= files=
  if [ "$COMP_CWORD" -eq 1 ]; then
    words='completions merge plugins quant run verify --help --version'
  else
    case $command:$before in
      merge:--scale) words= ;;
      merge:--output|merge:-o) words= files=1 ;;
      merge:--workers) words= ;;
      merge:--memory-limit) words= ;;
      quant:--format) words='int8_tensorwise' ;;
      quant:--scaling) words='tensor row' ;;
      quant:--optimizer) words='quip rtn' ;;
      quant:--rotate) words='auto off 256 64 16' ;;
      quant:--only) words= ;;
      quant:--skip) words= ;;
      quant:--output|quant:-o) words= files=1 ;;
      quant:--workers) words= ;;
      quant:--memory-limit) words= ;;
      run:--output|run:-o) words= files=1 ;;
      run:--workers) words= ;;
      run:--memory-limit) words= ;;
      verify:--against) words= files=1 ;;
      verify:--min-sqnr) words= ;;
      verify:--max-error) words= ;;
      verify:--workers) words= ;;
      verify:--memory-limit) words= ;;
      *) case $command in
        completions) words='bash zsh fish --quiet -q --debug --help' ;;
        merge) words='--scale --dampen --no-dampen --allow-unmatched --output -o --force --restart --dry-run --workers --memory-limit --json --quiet -q --debug --help' files=1 ;;
        plugins) words='--json --quiet -q --debug --help' ;;
        quant) words='--format --scaling --optimizer --rotate --only --skip --save-quant-metadata --output -o --defer --force --restart --dry-run --workers --memory-limit --json --quiet -q --debug --help' files=1 ;;
        run) words='--output -o --force --restart --dry-run --workers --memory-limit --json --quiet -q --debug --help' files=1 ;;
        verify) words='--against --min-sqnr --max-error --header-only --workers --memory-limit --json --quiet -q --debug --help' files=1 ;;
      esac ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  [ -n "$files" ] && [ "${word#-}" = "$word" ] && COMPREPLY+=($(compgen -f -- "$word"))
}
complete -o filenames -F _cq cq
