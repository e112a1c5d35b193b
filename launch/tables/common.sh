# What the scripts of this folder share; sourced, not run.
#
#   bash launch/tables/table_02.sh [full|mini|demo]
#
# SIZE (the argument): full is the paper's setting and needs an accelerator, the data sets and the checkpoints; demo is
# the embedded suite with tiny models; mini is real data with small models and needs DATA=<folder of parquet files>.
# Environment: SEEDS ("41 42 43 44" in full, 41 in mini, 51 in demo, whose settings were chosen with others), RUNS
# (runs/tables-SIZE), OUT (reports/tables-SIZE), JOBS (runs at a time, 1; in demo 2, since much of such a run is
# compiling), FIELDS (further --config.KEY=VALUE arguments of every run), SWEEP (the margins besides Table 22's; set it to
# nothing where Tables 11-13 and Figure 4 are not wanted: a third of the time).
#
# Runs are shared: each is trained once, under RUNS, and a finished one is not trained again, even if FIELDS or SWEEP
# have changed: name another RUNS then. One TAP run yields TAP, all its ablations and margins, FedAvg, FedAvg +
# Post-train, FedAvg + 2P and Local; only in demo, where Local has a learning rate of its own, that is another run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

SIZE=${1:-full}
case $SIZE in
    full) SEEDS=${SEEDS:-41 42 43 44} ;;
    mini) : "${DATA:?set it to the folder of parquet files}" ;;
    demo) SEEDS=${SEEDS:-51} JOBS=${JOBS:-2} ;;
    *) echo "$0: unknown size '$SIZE'; use full, mini or demo" >&2; exit 2 ;;
esac
SEEDS=${SEEDS:-41} RUNS=${RUNS:-runs/tables-$SIZE} OUT=${OUT:-reports/tables-$SIZE} JOBS=${JOBS:-1} FIELDS=${FIELDS:-}

# Table 22, and the settings of Tables 11-13: low for image generation and text classification, high for the others.
flava_margins="{'image_classification':0.01,'image_generation':0.005,'text_classification':0.005,'text_generation':0.01}"
vilt_margins="{'image_classification':0.01,'image_generation':0.01,'text_classification':0.01,'text_generation':0.02}"
sweep=${SWEEP-(0.01,0.04),(0.02,0.05),(0.05,0.1)}
tap_variants="'tap','tap-no-kd','tap-stage1','tap-stage2','fedavg','fedavg+post','fedavg+2p'"
[[ $SIZE == demo ]] || tap_variants+=",'local'"

config_of() { # model -> config file and the fields that make it that model
    case $SIZE-$1 in
        full-*) echo "configs/$1.py:" ;;
        demo-flava) echo "configs/demo.py:" ;;
        demo-vilt) echo "configs/demo_vilt.py:" ;;
        mini-flava) echo "configs/mini.py:data.root=$DATA," ;;
        mini-vilt) echo "configs/mini.py:data.root=$DATA,model.name=vilt,federation.table=vilt,model.backbone_layers=(2,2)," ;;
    esac
}

train() { # config arguments name [fields]: one run, unless it has finished
    local workdir=$RUNS/$2
    [[ -f $workdir/results.json ]] && return
    mkdir -p "$RUNS"
    echo "$(date +%T) $2"
    # shellcheck disable=SC2086
    tap-jax train --config="$1" --workdir="$workdir" $FIELDS >"$RUNS/$2.log" 2>&1 ||
        { echo "$2 failed; see $RUNS/$2.log" >&2; tail -n 1 "$RUNS/$2.log" >&2; return 1; }
}

runs=()
need() { # model method [backbone]: notes the runs, one for each seed
    local model=$1 method=$2 backbone=${3:-routed} name fields seed
    case $method in
        tap) local margins=${model}_margins; fields="variants=($tap_variants),margins=(${!margins},$sweep)" ;;
        local)
            # As launch/tables/learning_rates.py chose (launch/docs/findings.md); all others have configs/demo.py's.
            fields="method=local,variants=('local',),optimizer.learning_rate_initial=2e-3"
            fields+=",optimizer.learning_rate=8e-3,optimizer.post_learning_rate=8e-3"
            ;;
        fedavg) fields="method=fedavg,variants=('fedavg','fedavg+post','fedavg+2p')" ;;
        per_fedavg) fields="method=per_fedavg,variants=('per-fedavg','per-fedavg+post')" ;;
        disentafl) fields="method=disentafl,variants=('disentafl','disentafl+post','disentafl+2p')" ;;
        feddat) fields="method=feddat,variants=('feddat','feddat+post')" ;;
        centralised) fields="method=centralised,variants=()" ;;
    esac
    for seed in $SEEDS; do
        name=$model-$method-$seed
        [[ $backbone == standard ]] && name=$model-$method-standard-$seed
        runs+=("$(config_of "$model")$fields,model.backbone=$backbone,seed=$seed" "$name")
    done
}

need_all() { # model: the methods of Tables 1-3
    local method
    for method in tap per_fedavg disentafl feddat; do need "$1" "$method"; done
    [[ $SIZE != demo ]] || need "$1" local
}

need_standard() { # model: the rows of Tables 14-16 on the standard backbone
    local method
    for method in fedavg per_fedavg feddat; do need "$1" "$method" standard; done
}

need_everything() { # every table's runs, and a centralised one beside them
    local model
    for model in flava vilt; do
        need_all "$model"
        need "$model" fedavg # for Table 7's memory without TAP
        need_standard "$model"
        need "$model" centralised
    done
}

play() { # trains what was noted, JOBS at a time
    export -f train
    export RUNS FIELDS
    printf '%s\0' "${runs[@]}" | xargs -0 -n 2 -P "$JOBS" bash -c 'train "$@"' train
}

report() { # plays the runs and makes the report of those that finished; fails if any did not
    local folders=() i failed=0
    play || failed=1
    for ((i = 1; i < ${#runs[@]}; i += 2)); do
        [[ ! -f $RUNS/${runs[i]}/results.json ]] || folders+=("$RUNS/${runs[i]}")
    done
    # Methods have learning rates of their own.
    tap-jax report "${folders[@]}" --out="$OUT" --across=optimizer
    return "$failed"
}
