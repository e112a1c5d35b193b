#!/usr/bin/env bash
# Every table and figure, and a centralised run beside them.  bash launch/tables/all.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need_everything
report
