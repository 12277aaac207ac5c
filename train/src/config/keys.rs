//! Every key with its help: the source of the documentation, of the checks and of the error messages.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::{Config, Job};

/// What values a key takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// A list of texts; one text counts as a list of one.
    Texts,
    /// A list of whole numbers; one number counts as a list of one.
    Counts,
    /// True or false.
    Flag,
    /// A whole number, 0 or greater.
    Count,
    /// A number.
    Number,
}

impl Kind {
    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Texts => "list of texts",
            Self::Counts => "list of whole numbers",
            Self::Flag => "true or false",
            Self::Count => "whole number",
            Self::Number => "number",
        }
    }
}

/// One key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// `section.key`.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// One line.
    pub help: &'static str,
}

const fn key(name: &'static str, kind: Kind, help: &'static str) -> Key {
    Key { name, kind, help }
}

/// All keys, in the order of the sections. Methods add their own `optimizer.` keys.
pub const KEYS: &[Key] = &[
    key("run.job", Kind::Text, "what the run does, `pretrain` or `finetune`; each command has its own"),
    key("run.out", Kind::Text, "folder of the run; empty: the next free `runs/NAME-001`"),
    key(
        "model.name",
        Kind::Text,
        "a named shape such as `llama-9m`, or a Hugging Face model folder to go on from; empty: the default job's shape",
    ),
    key(
        "model.parameterization",
        Kind::Text,
        "what the linear layers of the blocks hold: `dense`, `low_rank`, `sltrain`, `cola`, `lost`, `relora` or `loro`; see `lowrank methods`",
    ),
    key("model.rank", Kind::Count, "width between the factors of a parameterization; unset: 128"),
    key(
        "model.alpha",
        Kind::Number,
        "`sltrain`, `relora`: the product of the factors is scaled by alpha / rank; unset: 32",
    ),
    key("model.density", Kind::Number, "`sltrain`, `lost`: share of the sparse part, between 0 and 1; unset: 0.03"),
    key("model.trained_scale", Kind::Flag, "`sltrain`, `relora`: whether the scale is trained; unset: false"),
    key("model.init", Kind::Text, "`low_rank`: how factors begin, `spectral`, `gaussian` or `lora`; unset: `spectral`"),
    key("model.gamma", Kind::Number, "`lost`: weight of the factors against the channels, 0 to 1; unset: 0.7"),
    key("model.keep_gate", Kind::Flag, "`cola`: whether the feed-forward part keeps its non-linearity; unset: true"),
    key("model.reset_every", Kind::Count, "`relora`: updates from one restart to the next; unset: 5000"),
    key(
        "model.restart_warmup",
        Kind::Count,
        "`relora`, `loro`: steps over which the learning rate comes back after a restart; unset: 100, `loro` 5",
    ),
    key(
        "model.reset",
        Kind::Text,
        "`relora`: what a restart makes of the factors' moments, `zero`, `magnitude:Q` or `random:Q`; unset: `zero`",
    ),
    key("model.exact_every", Kind::Count, "`loro`: updates from one exact step to the next; unset: 500"),
    key(
        "model.lr_scaler",
        Kind::Number,
        "`loro`: factor of the steps between, greater than 0; -1: the rank over the model's width; unset: -1",
    ),
    key("model.hidden_size", Kind::Count, "width of the residual stream"),
    key("model.intermediate_size", Kind::Count, "width of the feed-forward part"),
    key("model.num_hidden_layers", Kind::Count, "number of blocks"),
    key("model.num_attention_heads", Kind::Count, "number of query heads"),
    key("model.num_key_value_heads", Kind::Count, "number of key and value heads; unset: as many as query heads"),
    key("model.head_dim", Kind::Count, "width of a head; unset: hidden_size / num_attention_heads"),
    key("model.max_position_embeddings", Kind::Count, "longest sequence"),
    key("model.rope_theta", Kind::Number, "base of the rotary angles"),
    key("model.rms_norm_eps", Kind::Number, "constant in the norms"),
    key("model.tie_word_embeddings", Kind::Flag, "whether the embedding serves as output head"),
    key(
        "adapter.name",
        Kind::Text,
        "structure of the adapter, one of `lowrank methods`; a folder: the adapter in it is trained on; `none`: all weights of the model are trained",
    ),
    key("adapter.rank", Kind::Count, "rank; unset: the method's own"),
    key("adapter.alpha", Kind::Number, "the update is multiplied by alpha / rank; unset: the method's own"),
    key(
        "adapter.scaling",
        Kind::Text,
        "what alpha is divided by: `rank`, or `root-rank` for its square root; unset: the method's own",
    ),
    key(
        "adapter.dropout",
        Kind::Number,
        "share of the adapter's inputs that is dropped in training, from 0 to below 1",
    ),
    key("adapter.init", Kind::Text, "how the adapter begins: `default`, or a start that `lowrank methods NAME` lists"),
    key("adapter.init_samples", Kind::Count, "rows of training data that the start `lora-sb` takes gradients of"),
    key(
        "adapter.targets",
        Kind::Text,
        "layers to adapt: `all-linear` (all but the head), names between commas, or a regular expression for whole paths",
    ),
    key("adapter.exclude", Kind::Text, "layers to leave out, as in `targets`; empty: none"),
    key("adapter.layers", Kind::Counts, "numbers of the blocks to adapt, from 0; empty: all"),
    key(
        "adapter.rank_pattern",
        Kind::Texts,
        "ranks of layers of their own, as `PATTERN=RANK`; the first pattern that matches the end of a path counts",
    ),
    key("adapter.alpha_pattern", Kind::Texts, "alphas of layers of their own, as `PATTERN=ALPHA`"),
    key("rule.name", Kind::Text, "how the adapter is trained, one of `lowrank methods`"),
    key(
        "data.path",
        Kind::Texts,
        "files and folders of text; empty: the sources of the burn crates that Cargo downloaded",
    ),
    key("data.format", Kind::Text, "`auto` (by file name), `text`, `jsonl`, `parquet` or `shards`"),
    key("data.field", Kind::Text, "field of JSON lines, or column of Parquet, that holds the text"),
    key("data.validation_fraction", Kind::Number, "part of the documents held out, between 0 and 1"),
    key("data.document_mask", Kind::Flag, "whether attention stays inside a document"),
    key(
        "data.learn_prompt",
        Kind::Flag,
        "whether prompts and the turns of others count as well, beside completions and the assistant's turns",
    ),
    key(
        "data.packing",
        Kind::Flag,
        "whether several examples share a row of `seq_len` tokens, each seeing itself alone",
    ),
    key("data.verify", Kind::Flag, "whether to check the hashes of all token files before the first step"),
    key("data.cache", Kind::Text, "folder for tokenizers and token shards made from text"),
    key(
        "tokenizer.path",
        Kind::Text,
        "a tokenizer.json; `bytes` for byte level without a file; empty: one trained on the data",
    ),
    key("tokenizer.vocab_size", Kind::Count, "ids of a trained tokenizer"),
    key("optimizer.name", Kind::Text, "one of `lowrank methods`"),
    key("optimizer.lr", Kind::Number, "highest learning rate, greater than 0"),
    key("optimizer.weight_decay", Kind::Number, "decoupled weight decay of matrices"),
    key("optimizer.clip", Kind::Number, "global norm that gradients are scaled down to; 0: no clipping"),
    key(
        "optimizer.block_clip",
        Kind::Number,
        "with `train.backward = per-layer`: norm that the gradients of each block are scaled down to, another thing than a global norm; 0: no clipping",
    ),
    key("optimizer.include", Kind::Text, "regular expression for paths of further matrices that the optimizer takes"),
    key("optimizer.exclude", Kind::Text, "regular expression for paths of matrices that take AdamW instead"),
    key(
        "schedule.kind",
        Kind::Text,
        "`cosine`, `linear`, `constant`, `wsd` (warm-up, stable, decay) or `cosine-restarts` (the default of `relora` and `loro`)",
    ),
    key("schedule.warmup_steps", Kind::Count, "steps of linear warm-up; 0: as `warmup_fraction` says"),
    key(
        "schedule.warmup_fraction",
        Kind::Number,
        "part of the run that is warm-up when `warmup_steps` is 0, from 0 to 1",
    ),
    key("schedule.final_fraction", Kind::Number, "last learning rate as a part of the highest, from 0 to 1"),
    key("schedule.decay_fraction", Kind::Number, "part of the run over which `wsd` decays, from 0 to 1"),
    key(
        "schedule.adjust_steps",
        Kind::Count,
        "`cosine-restarts`: steps by which the cosine stands further on, for a model that was trained before",
    ),
    key("train.steps", Kind::Count, "steps of the run; 0: no limit"),
    key("train.tokens", Kind::Count, "tokens of the run; 0: no limit"),
    key("train.epochs", Kind::Number, "times that every row is seen; 0: no limit"),
    key("train.minutes", Kind::Number, "minutes of the run, resumes included; 0: no limit"),
    key("train.batch", Kind::Count, "sequences in a micro-batch"),
    key("train.seq_len", Kind::Count, "tokens in a sequence"),
    key("train.accumulation", Kind::Count, "micro-batches in a step"),
    key(
        "train.backward",
        Kind::Text,
        "`whole`; `checkpointed`: block by block, in less memory and more time; `per-layer`: and each block is updated at once",
    ),
    key(
        "train.memory",
        Kind::Text,
        "most memory of the process, such as `8GiB`: of what is not set, parameterization, optimizer, backward and batch, the least is changed that makes the run fit",
    ),
    key("train.seed", Kind::Count, "seed of weights, order and samples"),
    key(
        "train.device",
        Kind::Text,
        "`cpu`, or a GPU of a build with that feature: `cuda`, `vulkan`, `wgpu`, `metal`, `rocm`, with `:N` for the N-th",
    ),
    key("train.threads", Kind::Count, "CPU threads; 0: one a core"),
    key(
        "train.max_skipped_steps",
        Kind::Count,
        "steps with a non-finite loss or gradient that may be passed over in the whole run",
    ),
    key("eval.every", Kind::Count, "steps between evaluations; 0: only at the end"),
    key(
        "eval.batches",
        Kind::Count,
        "batches of an evaluation during training; 0: all; the last evaluation always takes all",
    ),
    key("checkpoint.every", Kind::Count, "steps between checkpoints; 0: only at the end"),
    key("checkpoint.keep_last", Kind::Count, "newest checkpoints to keep, at least 1"),
    key("checkpoint.keep_best", Kind::Flag, "whether to keep the checkpoint with the lowest validation loss as well"),
    key("log.every", Kind::Count, "steps between logged steps, at least 1"),
    key("log.tensorboard", Kind::Flag, "whether to write TensorBoard event files"),
    key("log.histograms_every", Kind::Count, "steps between histograms of weights and gradients; 0: none"),
    key("log.sample_every", Kind::Count, "steps between samples of text; 0: before and after only"),
    key("log.sample_tokens", Kind::Count, "tokens of a sample"),
    key(
        "log.sample_prompt",
        Kind::Text,
        "how a sample begins; empty: in a fine-tuning as the first example that is held out",
    ),
];

/// The page that documents all keys, in Markdown.
pub fn documentation() -> String {
    let [pretrain, finetune] = [Job::Pretrain, Job::Finetune].map(|job| Config::of(job).entries());
    let mut page = String::from(
        "# Configuration\n\n\
         Generated from the program's own list; `LOWRANK_WRITE_DOCS=1 cargo test --release -p lowrank-train documentation` writes it anew.\n\n\
         A key stands in its section of the file given with `--config FILE.toml`, or on the command line as `--set section.key=value`.\n\
         Flags win over `--set`, `--set` over the file, the file over the defaults. Unknown keys are refused, and so are those without a meaning in\n\
         the command: a dash stands in their place.\n",
    );
    let mut section = "";
    for key in KEYS {
        let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
        if of != section {
            section = of;
            let _ = write!(
                page,
                "\n## {section}\n\n| key | values | `pretrain` | `finetune` | meaning |\n|---|---|---|---|---|\n"
            );
        }
        let default = |job: Job, defaults: &BTreeMap<String, String>| match defaults.get(key.name) {
            _ if !job.knows(key.name) => "-".into(),
            Some(value) => format!("`{value}`"),
            None => "unset".into(),
        };
        let (first, second) = (default(Job::Pretrain, &pretrain), default(Job::Finetune, &finetune));
        let _ = writeln!(page, "| `{name}` | {} | {first} | {second} | {} |", key.kind.name(), key.help);
        let own = match key.name {
            "optimizer.exclude" => "*method's own*, such as `beta_2`",
            "adapter.alpha_pattern" => "*structure's own*, such as `options.blocks`",
            "rule.name" => "*rule's own*, such as `options.ratio`",
            _ => continue,
        };
        let _ = writeln!(page, "| {own} | | | | see `lowrank methods NAME` |");
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_of_the_sections_is_listed_once_and_no_other() {
        let optional = ["model.", "adapter.rank", "adapter.alpha", "adapter.scaling"];
        let defaults: Vec<String> =
            [Job::Pretrain, Job::Finetune].into_iter().flat_map(|job| Config::of(job).entries().into_keys()).collect();
        for name in &defaults {
            assert_eq!(KEYS.iter().filter(|key| key.name == name).count(), 1, "{name}");
        }
        for key in KEYS {
            let known = defaults.iter().any(|name| name == key.name)
                || optional.iter().any(|start| key.name.starts_with(start));
            assert!(known, "{}", key.name);
        }
    }

    #[test]
    fn the_committed_documentation_is_current() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
        if std::env::var_os("LOWRANK_WRITE_DOCS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, documentation()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), documentation());
    }
}
