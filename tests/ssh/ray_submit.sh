#!/usr/bin/env bash
# ray up, ray submit and ray down of examples/cluster, end to end over ssh: ray_submit.sh FOLDER RUN OUT
#
# A machine of its own: namespaces with only a loopback interface, an sshd with keys of its own, a
# home and a Ray folder in FOLDER. Needs root, openssh-server, rsync, iproute2; ray on PATH.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ "${1:-}" != --inside ]; then
  exec unshare -n --pid --fork --mount-proc --kill-child bash "$here/ray_submit.sh" --inside "$@"
fi
folder="$2" run="$3" out="$4"
examples="$here/../../examples/cluster"
PATH="$PATH:/usr/sbin:/sbin"
ip link set lo up

# sshd takes the home from passwd; Ray puts its state into /tmp/ray.
mkdir -p "$folder/home/.ssh" "$folder/ray" /tmp/ray /run/sshd
sed "s|^\(root:[^:]*:[^:]*:[^:]*:[^:]*\):[^:]*:.*|\1:$folder/home:/bin/bash|" /etc/passwd > "$folder/passwd"
mount --bind "$folder/passwd" /etc/passwd
mount --bind "$folder/ray" /tmp/ray
export HOME="$folder/home" TMPDIR="$folder"

ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
cat > "$folder/sshd_config" <<CONFIG
ListenAddress 127.0.0.1
HostKey $folder/host_key
AuthorizedKeysFile $folder/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
CONFIG
"$(command -v sshd)" -f "$folder/sshd_config" -E "$folder/sshd.log"

# What the README asks of every node: the environment on PATH, and authentication by a token.
{
  echo "export PATH='$PATH' PYTHONPATH='${PYTHONPATH:-}' OMP_NUM_THREADS=1"
  echo "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
} > "$HOME/.bashrc"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
ray get-auth-token --generate > /dev/null

sed -e 's|HEAD #.*|127.0.0.1|' -e 's|USER$|root|' -e "s|~/.ssh/id_ed25519|$folder/key|" \
  "$examples/cluster.yaml" > "$folder/cluster.yaml"
cd "$examples"
ray up --yes "$folder/cluster.yaml"
code=0
ray submit "$folder/cluster.yaml" analyze.py "$run" "$out" || code=$?
ray down --yes "$folder/cluster.yaml"
exit "$code"
