#!/usr/bin/env bash
# Install Debian's Chromium for the browser tests, where there is none yet and root may use apt-get.
#
# Without it the browser tests are skipped, except with CI=true, which makes them fail.
set -euo pipefail
LIMIT_S=600
if [ -x /usr/bin/chromium ] || [ -x /usr/bin/google-chrome ]; then
    exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "there is no Chromium, and installing it needs root and apt-get" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
timeout "$LIMIT_S" apt-get update -q
timeout "$LIMIT_S" apt-get install -q -y --no-install-recommends chromium fonts-liberation
