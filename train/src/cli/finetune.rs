//! `lowrank finetune`.

use std::path::PathBuf;
use std::process::ExitCode;

use lowrank_models::adapter::{RULES, StructureEntry};
use lowrank_optim::registry::{Kind, find};

use super::training::{TrainingArgs, last_name, texts};
use crate::build::BuildError;
use crate::config::{Config, Job};

/// Fine-tune a model on examples, by an adapter of the frozen weights, or whole.
///
/// The data are JSON lines: {"prompt": .., "completion": ..}, or {"messages": [{"role": "user", "content": ..}, {"role": "assistant", ..}]}, written
/// as the model's chat template has it, or {"text": ..}. Completions, the assistant's turns and texts are what the model learns to write. A part is
/// held out to measure on.
///
/// A vision transformer or a CLIP is trained on images: folders DIR/class/*.png or *.jpg, JSON lines {"image": .., "label": .., "domain": ..}, or IDX files. Its
/// classifier is trained beside the adapter, and is a new one where the images have other classes.
///
/// The adapter says what is trained (lora: two thin factors beside each weight), the rule how (plain: by its gradients). A checkpoint holds the
/// adapter alone, as Python's peft reads it.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  lowrank finetune --model SmolLM2-135M --data chats.jsonl
  lowrank finetune --model SmolLM2-135M --data train.jsonl --adapter lora --rank 16 --alpha 32 --targets q_proj,v_proj
  lowrank finetune --model SmolLM2-135M --data train.jsonl --adapter lora --init pissa --rule lora-plus
  lowrank finetune --model SmolLM2-135M --data train.jsonl --allocation sora --rank 8
  lowrank finetune --model SmolLM2-135M --data more.jsonl --adapter runs/SmolLM2-135M-lora-001/checkpoints/step-000300
  lowrank finetune --model SmolLM2-135M --data train.jsonl --adapter none --backward per-layer --set optimizer.clip=0
  lowrank finetune --resume --out runs/SmolLM2-135M-lora-001
  lowrank finetune --model vit-base --data photos/ --adapter lora --targets q_proj,v_proj

`lowrank methods` lists adapters, rules and allocations, `lowrank methods NAME` the options of one, which are set as --set adapter.options.NAME=VALUE and
--set rule.options.NAME=VALUE and --set allocation.options.NAME=VALUE. docs/configuration.md lists all keys. Flags win over --set, --set over the file of --config, the file over the
defaults. The learning rate is that of rule or structure where none is given (2e-4 of lora), 2e-5 where all weights are trained.
Ctrl-C finishes the step, saves and exits; --resume resumes bit-exactly, as if the run had not been interrupted.")]
pub struct Args {
    /// Hugging Face model folder, or GGUF file
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// JSON lines: a file or folder; may be repeated. Images: a folder DIR/class/*, JSON lines, or an IDX file
    #[arg(long, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Structure of the adapter, see `lowrank methods`; a folder trains on the adapter in it, none trains all weights
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// How the adapter is trained, see `lowrank methods`
    #[arg(long, value_name = "NAME")]
    rule: Option<String>,
    /// How ranks, bits and modules are distributed over the layers in training, see `lowrank methods`
    #[arg(long, value_name = "NAME")]
    allocation: Option<String>,
    /// Storage of the frozen weights below the adapter: file (as they are), f32, bf16, int8, q8_0 or nf4
    #[arg(long, value_name = "STORAGE")]
    base: Option<String>,
    /// Rank of the adapter
    #[arg(long)]
    rank: Option<u32>,
    /// The update is multiplied by alpha / rank
    #[arg(long, allow_negative_numbers = true)]
    alpha: Option<f64>,
    /// Probability that an input of the adapter is zeroed in training
    #[arg(long, allow_negative_numbers = true)]
    dropout: Option<f64>,
    /// Layers to adapt: all-linear, names such as q_proj,v_proj, a regular expression for whole paths, or @FILE: the modules.json of a run that
    /// selected layers
    #[arg(long, value_name = "LAYERS")]
    targets: Option<String>,
    /// Initialisation of the adapter: default, pissa, olora, ..; see `lowrank methods NAME`
    #[arg(long, value_name = "NAME")]
    init: Option<String>,
    /// Domain of images that is not trained on, to measure on it later
    #[arg(long, value_name = "DOMAIN")]
    leave_out: Option<String>,
    #[command(flatten)]
    training: TrainingArgs,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut layers = args.training.layers().map_err(BuildError::from)?;
    layers.optional("--model", "model.name", args.model.as_deref());
    layers.optional("--data", "data.path", (!args.data.is_empty()).then(|| texts(&args.data)));
    layers.optional("--adapter", "adapter.name", args.adapter.as_deref());
    layers.optional("--rule", "rule.name", args.rule.as_deref());
    layers.optional("--allocation", "allocation.name", args.allocation.as_deref());
    layers.optional("--base", "weights.base", args.base.as_deref());
    layers.optional("--rank", "adapter.rank", args.rank);
    layers.optional("--alpha", "adapter.alpha", args.alpha);
    layers.optional("--dropout", "adapter.dropout", args.dropout);
    layers.optional("--targets", "adapter.targets", args.targets.as_deref());
    layers.optional("--init", "adapter.init", args.init.as_deref());
    layers.optional("--leave-out", "data.images.leave_out", args.leave_out.as_deref());
    let given = layers.has("optimizer.lr");
    let usual = |config: &mut Config| {
        let rule = find(Kind::Rule, RULES.iter().copied(), &config.rule.name).ok();
        let structure = StructureEntry::find(&config.adapter.name).map(|entry| entry.lr).ok();
        let of_rule = rule.and_then(|rule| rule.entry.lr).filter(|_| structure.is_some());
        if !given {
            config.optimizer.lr = of_rule.or(structure).unwrap_or(SLOW);
        }
    };
    let name = |config: &Config| match last_name(&config.model.name) {
        Some(model) => format!("{model}-{}", last_name(&config.adapter.name).unwrap_or_default()),
        None => "finetune".into(),
    };
    args.training.run(Job::Finetune, layers, name, usual)
}

/// Learning rate for updates like those of full fine-tuning.
const SLOW: f64 = 2e-5;
