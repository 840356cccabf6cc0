#!/bin/sh
# Starts redis-server with the given options and a single user: `selfpruner`, limited to the commands and keys that
# Self-Pruner uses. Every connection needs the password, which is read from a file.
set -eu
umask 077
export LC_ALL=C
secret=${REDIS_PASSWORD_FILE:-/run/secrets/redis_password}
users=${REDIS_USERS_FILE:-/tmp/users.acl}

refuse() {
    echo "the Redis password file $secret $1: write one with \`head -c 32 /dev/urandom | base64\`" >&2
    exit 2
}

[ -f "$secret" ] || refuse "is missing"
[ -r "$secret" ] || refuse "cannot be read by this user"
password=$(head -c 1025 "$secret")
[ -n "$password" ] || refuse "is empty"
[ ${#password} -le 1024 ] || refuse "is longer than 1,024 characters"
# The daemon, the workers, the health check and people also read this file, each in their own way. Only one line of
# printable ASCII means the same to all: some would take a carriage return, a blank or a byte order mark as part of it.
case $password in
*[!!-~]*) refuse "must hold one line of ASCII characters without blanks or carriage returns (Windows line ends)" ;;
esac
# The server stores only a hash. printf is built into the shell, so other processes cannot read its arguments.
hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)

connecting='+auth +hello +ping +select +client|setinfo +client|setname'
scripts='+evalsha +script|load +script|exists'
strings='+get +getrange +set +type +mget +del +exists +pttl +rename +scan +unlink'
lists_and_hashes='+lrange +llen +rpush +hget +hmget +hgetall +hset +hsetnx +hexists +hdel +hlen'
streams='+xadd +xack +xclaim +xdel +xgroup|create +xgroup|delconsumer +xinfo|consumers +xlen +xpending +xrange +xread +xreadgroup +xrevrange'
server='+info +time +multi +exec +discard'

# `default` is off, so nobody can log in as it, but it keeps its rights: when the server loads its append-only file, it
# replays transactions (all our scripts) as this user, and silently drops those that are not allowed.
# `selfpruner` starts with `reset`: no command, no key, no channel.
cat > "$users" <<USERS
user default off resetpass allkeys allchannels allcommands
user selfpruner reset on #$hash ~selfpruner:* $connecting $scripts $strings $lists_and_hashes $streams $server
USERS
unset password hash
exec redis-server --aclfile "$users" "$@"
