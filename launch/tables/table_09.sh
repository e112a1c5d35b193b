#!/usr/bin/env bash
# Table 9: TAP against 2P iterations of post-training, FLAVA, image tasks.  bash launch/tables/table_09.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need flava disentafl
report
