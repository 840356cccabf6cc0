#!/bin/sh
# Starts redis-server, with the options given, for one user: `selfpruner` may use the commands that Self-Pruner uses, on
# its own keys. There is no other user, and each connection needs the password, which is read from a file.
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
# The daemon, the workers, the health check and people read this file too, each in their own way. They agree on one line
# of printable ASCII; a carriage return, a blank or a byte order mark would be part of the password for some of them.
case $password in
*[!!-~]*) refuse "must hold one line of ASCII characters without blanks or carriage returns (Windows line ends)" ;;
esac
# The server keeps a hash, so that the password is in no second place. printf is part of the shell: it has no arguments
# that other processes could read.
hash=$(printf %s "$password" | sha256sum | cut -d ' ' -f 1)

connecting='+auth +hello +ping +select +client|setinfo +client|setname'
scripts='+evalsha +script|load +script|exists'
strings='+get +getrange +set +type +mget +del +exists +pttl +rename +scan +unlink'
lists_and_hashes='+lrange +llen +rpush +hget +hmget +hgetall +hset +hsetnx +hexists +hdel +hlen'
streams='+xadd +xack +xclaim +xdel +xgroup|create +xgroup|delconsumer +xinfo|consumers +xlen +xpending +xrange +xread +xreadgroup +xrevrange'
server='+info +time +multi +exec +discard'

# `default` is off, so that nobody can be it, but it keeps its rights: a server that loads its append-only file replays
# transactions (all our scripts) as this user, and drops those that it may not do, without an error in its log.
# `selfpruner` begins with `reset`, from nothing: no command, no key, no channel.
cat > "$users" <<USERS
user default off resetpass allkeys allchannels allcommands
user selfpruner reset on #$hash ~selfpruner:* $connecting $scripts $strings $lists_and_hashes $streams $server
USERS
unset password hash
exec redis-server --aclfile "$users" "$@"
