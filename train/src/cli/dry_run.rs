//! `lowrank pretrain --dry-run`.

use std::time::Duration;

use lowrank_models::LlamaConfig;
use lowrank_models::adapter::PlainRule;

use super::output::{print, table};
use super::plan::{Shaped, summary};
use crate::build::{BuildError, Listener};
use crate::config::{Config, Job, Layers, bytes, count, duration};
use crate::plan::{Forecaster, Freedom, choose, limit, operations, speed};
use crate::process::set_threads;
use crate::run::report::Console;

/// Time of the measurement.
const MEASURED: Duration = Duration::from_secs(1);

/// Prints what a pretraining run would be: shapes, memory, work of a step, and the time that it takes on this machine.
pub fn dry_run(layers: &Layers) -> anyhow::Result<()> {
    let config = layers.resolve(&Config::of(Job::Pretrain)).map_err(BuildError::from)?;
    let freedom = Freedom::of(layers, Job::Pretrain);
    let shaped = Shaped::of(config, freedom, Job::Pretrain)?;
    let llama = shaped.llama();
    let forecaster = Forecaster::new(&llama, None, &PlainRule {}, None);
    let (config, forecast) = match limit(&shaped.config)? {
        None => (shaped.config.clone(), forecaster.forecast(&shaped.config)?),
        Some(limit) => {
            let chosen = choose(&shaped.config, freedom, &shaped.shape, &|config| forecaster.forecast(config))?;
            Console::new(false).line(&format!("within {}: {}", bytes(limit), chosen.describe()));
            (chosen.config, chosen.forecast)
        }
    };
    let shape = llama(&config)?;
    set_threads(config.train.threads);
    let (work, rate) = (operations(&config, &shape), speed(&config, &shape, MEASURED));
    let seconds = work as f64 / rate;
    let tokens = (config.train.batch * config.train.accumulation * config.train.seq_len) as u64;
    let mut rows = vec![
        row("weights", bytes(forecast.weights)),
        row("gradients", bytes(forecast.gradients)),
        row("optimizer", format!("{} ({})", bytes(forecast.state), config.optimizer.name)),
        row("activations", bytes(forecast.activations)),
        row("peak memory", bytes(forecast.peak)),
        row("a step", format!("{} tokens, {:.2} TFLOP of products", count(tokens), work as f64 / 1e12)),
        row("this machine", format!("{:.0} GFLOP/s, measured for one second", rate / 1e9)),
        row(
            "time of a step",
            format!("{} or somewhat more: {} tokens a second", time(seconds), count((tokens as f64 / seconds) as u64)),
        ),
    ];
    if config.has_steps()
        && let Some(steps) = config.total_steps(0).filter(|steps| *steps > 1)
    {
        rows.push(row(
            "the run",
            format!("{} steps in {} or somewhat more", count(steps), duration(steps as f64 * seconds)),
        ));
    }
    print(&format!("{}\n\n{}\n{}", summary(&shape, &config), table(&shapes(&shape)), table(&rows)))?;
    Ok(())
}

fn row(name: &str, value: String) -> Vec<String> {
    vec![name.into(), value]
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", 1000.0 * seconds) } else { format!("{seconds:.1} s") }
}

/// The matrices, with their trained elements.
fn shapes(llama: &LlamaConfig) -> Vec<Vec<String>> {
    let method = llama.parameterization.method();
    let (kind, layers) = (llama.parameterization.name(), llama.num_hidden_layers);
    let mut rows = vec![["MATRICES", "SHAPE", "NUMBER", "STORED AS", "VALUES"].map(String::from).to_vec()];
    let mut push = |name: &str, [d_in, d_out]: [usize; 2], number: usize, kind: &str, values: usize| {
        let shape = format!("{d_in} x {d_out}");
        rows.push(vec![name.into(), shape, count(number as u64), kind.into(), count((number * values) as u64)]);
    };
    let table = [llama.vocab_size, llama.hidden_size];
    push("embedding", table, 1, "dense", table[0] * table[1]);
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    for (name, shape) in names.into_iter().zip(llama.block_shapes()) {
        push(name, shape, layers, kind, method.values(shape));
    }
    if !llama.tie_word_embeddings {
        push("head", [table[1], table[0]], 1, "dense", table[0] * table[1]);
    }
    rows
}
