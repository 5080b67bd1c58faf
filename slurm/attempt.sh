mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES[0]}
ALL=$(IFS=,; echo "${NODES[*]}")
REST=${ALL#"$HEAD"}
REST=${REST#,}

ATTEMPT=0
while ! mkdir "$RUN/logs/attempt-$ATTEMPT" 2>/dev/null; do
  ATTEMPT=$((ATTEMPT + 1))
  [ "$ATTEMPT" -lt 1000 ] || { echo "cannot write $RUN/logs" >&2; exit 1; }
done
LOGS=$RUN/logs/attempt-$ATTEMPT
ln -sfn "attempt-$ATTEMPT" "$RUN/logs/latest"
exec >>"$LOGS/job.log" 2>&1
say() { echo "$(date '+%F %T') $*"; }
say "job $SLURM_JOB_ID, attempt $ATTEMPT (restart ${SLURM_RESTART_COUNT:-0}), nodes $ALL"

BEGUN=$(date +%s)
record() { # OUTCOME REASON: one line for `redone status`
  printf '{"attempt": %d, "job": "%s", "nodes": "%s", "begun": %d, "ended": %d, "outcome": "%s", "reason": "%s"}\n' \
    "$ATTEMPT" "$SLURM_JOB_ID" "$ALL" "$BEGUN" "$(date +%s)" "$1" "$2" >>"$RUN/slurm/attempts.jsonl"
  say "$1: $2"
}

tick() { # half a second in which traps run
  sleep 0.5 &
  wait $!
}

# alive PID: a child of this script that still runs; a bare number could by now be somebody else's process
alive() {
  local pid
  for pid in $(jobs -pr); do [ "$pid" != "$1" ] || return 0; done
  return 1
}
end_steps() { # srun passes USR2 on, after TERM it has its tasks killed at once: they clean up on USR2, then TERM
  local pids tries weights
  weights=$(cat "$LOGS/weights-path" 2>/dev/null)
  rm -f "$LOGS/ray-token" "$LOGS/weights-path" "$weights"
  pids=$(jobs -pr)
  [ -z "$pids" ] || kill -USR2 $pids 2>/dev/null
  for tries in {1..40}; do
    pids=$(jobs -pr)
    [ -n "$pids" ] || break
    tick
  done
  [ -z "$pids" ] || kill $pids 2>/dev/null
  wait
  rm -f "$weights"
}

finish() { # CODE OUTCOME REASON
  record "$2" "$3"
  end_steps
  exit "$1"
}

# requeue REASON [NODES]: back into the queue, never again on NODES
requeue() {
  local excluded
  [ -z "${2:-}" ] || tr ',' '\n' <<<"$2" >>"$RUN/slurm/excluded"
  excluded=$(sort -u "$RUN/slurm/excluded" 2>/dev/null | paste -sd,)
  [ $((${SLURM_RESTART_COUNT:-0} + 1)) -lt "$MAX_ATTEMPTS" ] ||
    finish 1 failed "$1; this was the last of $MAX_ATTEMPTS attempts (REDONE_MAX_ATTEMPTS)"
  record requeued "$1"
  trap '' TERM USR1
  end_steps
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  for _ in 1 2 3 4 5; do # only a pending job takes it
    [ -z "$excluded" ] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" || { sleep 0.3; continue; }
    break
  done
  exit 0
}

STOP_AT=
on_limit() { # the driver looks for the file after every step, saves and exits with 75
  say "time limit in $LEAD s: stop after this step"
  touch "$LOGS/stop"
  STOP_AT=$((SECONDS + LEAD - (LEAD > 240 ? 60 : LEAD / 4)))
}
on_term() {
  trap '' TERM
  record cancelled "SIGTERM"
  end_steps
  exit 143
}
trap on_limit USR1
trap on_term TERM

# await_exit PID [PIDS...]: sets CODE, or CODE=late when the time limit came too near. When one of PIDS has ended,
# PID has a minute to find out by itself.
await_exit() {
  local pid=$1 lost= step
  shift
  while alive "$pid"; do
    for step in "$@"; do
      alive "$step" || lost=${lost:-$((SECONDS + 60))}
    done
    [ -z "$lost" ] || [ "$SECONDS" -lt "$lost" ] || kill -KILL "$pid"
    if [ -n "$STOP_AT" ] && [ "$SECONDS" -ge "$STOP_AT" ]; then
      CODE=late
      return
    fi
    tick
  done
  wait "$pid"
  CODE=$?
}

# await_file FILE PID: until FILE is there; fails when the step PID ended without it
await_file() {
  until [ -s "$1" ]; do
    alive "$2" || { sleep 1; [ -s "$1" ]; return; }
    tick
  done
}

# nodes that do not answer to SLURM within a minute, comma separated; the script itself runs on HEAD
silent_nodes() {
  local node asked=() silent=()
  for node in "${NODES[@]:1}"; do
    timeout 60 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --mem=0 touch "$LOGS/.alive-$node" \
      </dev/null >/dev/null 2>&1 &
    asked+=($!)
  done
  [ ${#asked[@]} -eq 0 ] || wait "${asked[@]}"
  for node in "${NODES[@]:1}"; do
    rm "$LOGS/.alive-$node" 2>/dev/null || silent+=("$node")
  done
  (IFS=,; echo "${silent[*]-}")
}

# ---- preflight: facts and speeds of every node, before anything else starts
step "$ALL" "$LOGS/preflight.log" preflight "$LOGS/preflight" --nodes "$ALL" --run "$RUN" --ports "$PORTS" &
await_exit $!
BAD=$(cat "$LOGS/preflight/bad-nodes" 2>/dev/null)
if [ -n "$BAD" ]; then
  requeue "preflight: $(cat "$LOGS/preflight/verdict")" "$BAD"
elif [ "$CODE" != 0 ]; then
  SILENT=$(silent_nodes)
  [ -z "$SILENT" ] || requeue "preflight: $SILENT do not answer" "$SILENT"
  finish 1 failed "preflight ended with $CODE: $LOGS/preflight.log"
fi

# ---- Ray: one node process per SLURM node, a token of this job, services in this job's ports
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOGS/ray-token REDONE_LOG_DIR=$LOGS REDONE_STOP_FILE=$LOGS/stop
(umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
NODE_ARGS=(--nodes "$ALL" --ports "$PORTS" --scratch "$SCRATCH" --cpus "$RAY_CPUS" --object-store-mb "$OBJECT_STORE_MB"
  --address-file "$LOGS/ray-address")
step "$HEAD" "$LOGS/ray-steps.log" node --head "${NODE_ARGS[@]}" &
RAY_STEPS=($!)
await_file "$LOGS/ray-address" $! || requeue "Ray's head did not start on $HEAD: $LOGS/ray-$HEAD.log" "$HEAD"
if [ -n "$REST" ]; then
  step "$REST" "$LOGS/ray-steps.log" node "${NODE_ARGS[@]}" &
  RAY_STEPS+=($!)
fi

# ---- the run
RAY_ADDRESS=$(cat "$LOGS/ray-address") step "$HEAD" "$LOGS/driver.out" attempt "$RUN" &
await_exit $! "${RAY_STEPS[@]}"
case "$CODE" in
  0) finish 0 done "the run is finished" ;;
  75) requeue "time limit: state saved" ;;
  late) requeue "time limit: the step was not done in time; it is repeated from the last checkpoint" ;;
esac
SILENT=$(silent_nodes)
[ -z "$SILENT" ] || requeue "lost $SILENT" "$SILENT"
finish "$CODE" failed "the run ended with $CODE: $(tail -n 1 "$LOGS/driver.out" | tr -d '"\\' | cut -c1-300)"
