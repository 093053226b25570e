#!/bin/sh
# Fill a composed registry that holds nothing yet from a backup: deploy/restore.sh FOLDER [DUMP]
# The newest dump unless one is named. Afterwards: docker compose up -d
set -eu
[ $# -ge 1 ] || { sed -n '2,3p' "$0" >&2; exit 2; }
compose=${COMPOSE:-docker compose}
folder=$(cd "$1" && pwd)
dump=${2:-$(ls "$folder"/database/*Z.dump | sort | tail -n 1)}
dump=$(cd "$(dirname "$dump")" && pwd)/$(basename "$dump")
cd "$(dirname "$0")/.."

if [ ! -d secrets ]; then
    cp -Rp "$folder/secrets" . && mkdir -p sources && echo 'secrets/ is the one of the backup'
elif [ -f "$folder/secrets/secret" ] && [ "$(cat "$folder/secrets/secret")" != "$(cat secrets/secret)" ]; then
    echo "secrets/secret is not the backup's, with which alone the restored keys are valid. Nothing was changed. To take" >&2
    echo "the backup's secrets/, move the one that is here away (mv secrets secrets.old) and call this again." >&2
    exit 1
fi
$compose up -d postgres
until $compose exec -T postgres pg_isready --quiet --username=blueprints --host=127.0.0.1; do sleep 1; done
echo "database from $dump"
$compose exec -T postgres pg_restore --username=blueprints --dbname=blueprints --single-transaction --exit-on-error \
    --no-owner --no-privileges <"$dump"
for part in blobs checkpoints; do
    if [ -d "$folder/$part" ]; then
        tar -C "$folder" -cf - "$part" | $compose run --rm --no-deps -T api tar -C /data/store -xf -
    fi
done
$compose run --rm --no-deps -T migrate
$compose run --rm --no-deps -T api python -m app verify
