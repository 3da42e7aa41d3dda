"""What the batch script of a job does, from the allocation to its end; slurm.py puts the job's own values before it.

It runs on the first node, in bash, with nothing else of ours: Python may be in a container. What it relies on was seen
on SLURM 22.05 (tests/cluster) and read in its sources:

- SIGTERM to srun kills the tasks at once, so that steps are told by `scancel --signal`, which leaves this shell out.
- The exit status of a task that SLURM sent SIGTERM is forgotten, srun returns 0 even when saving failed. So tasks leave
  theirs in files.
- When one task fails, srun sends the others SIGTERM, and SIGKILL after KillWait (`--kill-on-bad-exit`).
- Near the time limit SIGUSR1 comes to this shell alone (`--signal=B:USR1@...`), up to 60 seconds early.
- Preemption with a grace time sends the steps SIGTERM and leaves this shell out; SLURM requeues the job only at the end
  of that time, and a job that has ended by then is done. So this script requeues it, as PreemptTime says why.
- Preemption without a grace time, a requeue and `scancel JOB` send SIGTERM to the steps, srun and this shell, and
  SIGKILL after KillWait. SLURM does the rest. `scontrol requeue` in that time would queue a cancelled job again, so
  that nothing is requeued once this shell was told to end.
- `scancel --signal=TERM JOB` tells the steps alone: the run saves and ends, and the job with it.
"""

# Reads: run_dir, nodes, port, requeue, max_restarts, and the arrays srun_options, agent.
BODY = r"""
attempt=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
statuses=$run_dir/launch/status-$attempt
failures=$run_dir/launch/failures-$SLURM_JOB_ID
# Numbers of jobs begin anew when a cluster is made anew.
rm -f "$statuses".*
[[ -n ${SLURM_RESTART_COUNT:-} ]] || rm -f "$failures"

say() { echo "mempar: $1" >&2; }

head_address() {
  local hosts node
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  node=$(scontrol show node --oneliner "${hosts%%$'\n'*}")
  if [[ ! $node =~ NodeAddr=([^[:space:]]+) ]]; then
    say "scontrol does not say the address of ${hosts%%$'\n'*}, where the nodes are to meet; see \`scontrol show node\`"
    return 1
  fi
  echo "${BASH_REMATCH[1]}"
}

newest_checkpoint() {
  local found=("$run_dir"/checkpoints/step_????????)
  echo "${found[-1]}"
}

preempted() {
  local job
  job=$(scontrol show job "$SLURM_JOB_ID") || return 1
  [[ $job =~ [[:space:]]PreemptTime=([^[:space:]]+) && ${BASH_REMATCH[1]} != None ]]
}

start_again() {
  # SLURM sends all of the job SIGTERM when it requeues it, maybe before scontrol has its answer; passed on, it could
  # reach the job's next start.
  trap '' TERM
  if [[ $requeue == no ]]; then
    say "$1; slurm.requeue is off: go on with --resume"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "$1; the job is queued again"
  else
    say "$1, and SLURM does not queue the job again; go on with --resume"
  fi
}

# What this shell was told: `limit` near the time limit, `end` by whoever ends the job.
told=
# shellcheck disable=SC2317  # traps call it
pass_on() {
  told=$1
  # Where SLURM ends the job itself it would try again and again, for minutes.
  timeout 5 scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null &
}

# Before anything that takes a while: either would end this shell.
trap 'pass_on limit' USR1
trap 'pass_on end' TERM
address=$(head_address)
before=$(newest_checkpoint)
# shellcheck disable=SC2016  # the tasks' own shells expand it
task='trap : TERM; "$@"; status=$?; [ "$status" = 0 ] || echo "$status" >"$0.$SLURM_NODEID"; exit "$status"'
srun "${srun_options[@]}" sh -c "$task" "$statuses" "${agent[@]}" --rendezvous "$address:$port" --attempt "$attempt" &
step=$!
# A trap ends a wait early.
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
status=0
wait "$step" || status=$?
# The least: those that srun ends because another one failed die of signals, 128 and more.
left=$(sort -nu "$statuses".* 2>/dev/null) || true
if [[ $'\n'$left$'\n' == *$'\n2\n'* ]]; then
  status=2
elif [[ -n $left ]]; then
  status=${left%%$'\n'*}
fi

if [[ $status == 2 ]]; then
  say "bad input, which no restart mends"
elif [[ $told == end ]]; then
  say "told to end by SLURM, which queues the job again if it is to go on"
elif preempted; then
  start_again "preempted"
elif [[ $status == 0 && $told == limit && $(newest_checkpoint) != "$before" ]]; then
  start_again "saved before the time limit"
elif [[ $status != 0 || $told == limit ]]; then
  what="failed with status $status"
  [[ $status != 0 ]] || what="saved nothing before the time limit"
  echo "$attempt $what" >>"$failures"
  count=$(wc -l <"$failures")
  if ((count <= max_restarts)); then
    start_again "$what, restart $count of $max_restarts"
  else
    say "$what, with $((count - 1)) of $max_restarts restarts done"
  fi
fi
exit "$status"
"""
