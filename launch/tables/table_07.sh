#!/usr/bin/env bash
# Table 7: parameters, measured memory and seconds of Stage 2 per client.  bash launch/tables/table_07.sh [full|mini|demo]
source "$(dirname "$0")/common.sh"
need flava tap
need vilt tap
report
