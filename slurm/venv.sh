[ -z "${REDONE_MODULES:-}" ] || module load $REDONE_MODULES

SRUN=(srun --overlap --cpus-per-task="$CPUS" --cpu-bind=none --mem=0)

# step NODES LOG ARGS...: `redone ARGS` once on each of NODES (comma separated), output to LOG.
# Always in the background: it becomes the srun, so that its pid is the one to wait for and to end.
step() {
  local nodes=$1 log=$2 commas=${1//[^,]/}
  shift 2
  exec "${SRUN[@]}" --nodes=$((${#commas} + 1)) --ntasks=$((${#commas} + 1)) --nodelist="$nodes" \
    --output="$log" --open-mode=append \
    "$PYTHON" -m redone_launcher.main "$@" </dev/null
}
