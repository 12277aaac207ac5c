//! The sections: every key with its default, its documentation and what it allows.

use std::path::PathBuf;

use lowrank_models::BaseStorage;
use lowrank_models::adapter::{Scaling, TrainedBiases};
use lowrank_models::hub::FileType;
use lowrank_optim::WeightStorage;
use lowrank_optim::registry::Options;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Job;
use crate::data::{Format, TooLong};
use crate::engine::{BackwardMode, ScheduleKind};

macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty = $default:expr,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $kind,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

section! {
    /// What the run does and where it is written.
    RunSection {
        /// What the run does; each command has its own.
        job: Job = Job::Pretrain,
        /// Folder of the run; empty: the next free `runs/NAME-001`.
        out: PathBuf = PathBuf::new(),
    }
}

section! {
    /// Shape of the model and what its layers hold.
    ModelSection {
        /// A named shape such as `llama-9m`, or a Hugging Face model folder to continue from; empty: the default job's shape.
        name: String = String::new(),
        /// What the linear layers of the blocks hold.
        parameterization: ParameterizationSection = ParameterizationSection::default(),
        /// Width of the residual stream.
        #[schemars(range(min = 1, max = 131_072))]
        hidden_size: Option<usize> = None,
        /// Width of the feed-forward part.
        #[schemars(range(min = 1, max = 1_048_576))]
        intermediate_size: Option<usize> = None,
        /// Number of blocks.
        #[schemars(range(min = 1, max = 1024))]
        num_hidden_layers: Option<usize> = None,
        /// Number of query heads.
        #[schemars(range(min = 1, max = 4096))]
        num_attention_heads: Option<usize> = None,
        /// Number of key and value heads.
        #[schemars(range(min = 1, max = 4096), extend("x-unset" = "as many as query heads"))]
        num_key_value_heads: Option<usize> = None,
        /// Width of a head.
        #[schemars(range(min = 1, max = 8192), extend("x-unset" = "hidden_size / num_attention_heads"))]
        head_dim: Option<usize> = None,
        /// Longest sequence.
        #[schemars(range(min = 1, max = 16_777_216))]
        max_position_embeddings: Option<usize> = None,
        /// Base of the rotary angles.
        #[schemars(range(min = 1.0, max = 1e12))]
        rope_theta: Option<f64> = None,
        /// Constant in the norms.
        #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
        rms_norm_eps: Option<f64> = None,
        /// Use the embedding as output head.
        tie_word_embeddings: Option<bool> = None,
    }
}

section! {
    /// What the linear layers of the blocks hold.
    ParameterizationSection {
        /// Parameterization of the linear layers, one of `lowrank methods`.
        name: String = "dense".into(),
        /// Options of the parameterization; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// Adapter of a fine-tuning.
    AdapterSection {
        /// Structure of the adapter, one of `lowrank methods`; a folder: the adapter in it is trained further; `none`: all weights are trained.
        name: String = "lora".into(),
        /// Rank.
        #[schemars(range(min = 1, max = 131_072), extend("x-unset" = "the structure's own"))]
        rank: Option<usize> = None,
        /// Scale: the update is multiplied by alpha / rank.
        #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0, "x-unset" = "the structure's own"))]
        alpha: Option<f64> = None,
        /// Divisor of alpha.
        #[schemars(extend("x-unset" = "the structure's own"))]
        scaling: Option<Scaling> = None,
        /// Probability that an input of the adapter is zeroed in training.
        #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
        dropout: f64 = 0.0,
        /// Initialisation: `default`, or one that `lowrank methods NAME` lists.
        init: String = "default".into(),
        /// Rows of training data whose gradients a data-driven initialisation uses.
        #[schemars(range(min = 1, max = 1_000_000))]
        init_samples: usize = 50,
        /// Adapted layers: `all-linear` (all but the head), names between commas, a regular expression for whole paths, or `@FILE`: a
        /// `modules.json` of a run that selected layers.
        targets: String = "all-linear".into(),
        /// Layers left out, written as in `targets`; empty: none.
        exclude: String = String::new(),
        /// Numbers of the adapted blocks, from 0; empty: all.
        #[schemars(inner(range(max = 4096)))]
        layers: Vec<usize> = Vec::new(),
        /// Modules trained whole in addition to the adapter and stored with it, by the ends of their paths: `embed_tokens`, `lm_head`.
        modules_to_save: Vec<String> = Vec::new(),
        /// Biases trained in addition to the adapter and stored with it.
        bias: TrainedBiases = TrainedBiases::None,
        /// Ranks of single layers, as `PATTERN=RANK`; the first pattern that matches the end of a path counts. `@FILE`: layers and ranks of the
        /// `rank.json` of another run.
        rank_pattern: Vec<String> = Vec::new(),
        /// Alphas of single layers, as `PATTERN=ALPHA`.
        alpha_pattern: Vec<String> = Vec::new(),
        /// Options of the structure; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// How weights are stored.
    WeightsSection {
        /// Storage of trained matrices; all arithmetic is f32.
        storage: WeightStorage = WeightStorage::F32,
        /// Storage of the frozen weights below an adapter.
        base: BaseStorage = BaseStorage::File,
    }
}

section! {
    /// How the adapter is trained.
    RuleSection {
        /// Training rule of the adapter, one of `lowrank methods`.
        name: String = "plain".into(),
        /// Options of the rule; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// How ranks, bits and modules are distributed over the layers while the adapter is trained.
    AllocationSection {
        /// Allocation of the adapter, one of `lowrank methods`; `none`: every layer keeps what it starts with.
        name: String = "none".into(),
        /// Options of the allocation; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// Penalty on trained matrices, added to the loss.
    PenaltySection {
        /// Penalty, one of `lowrank methods`; `none`: the loss alone.
        name: String = "none".into(),
        /// Matrices that it is applied to: `adapter-a` and `adapter-b` for the factors of the adapter, or regular expressions for the ends of parameter names.
        matrices: Vec<String> = vec!["adapter-a".into(), "adapter-b".into()],
        /// Options of the penalty; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// Images, for a vision transformer.
    ImagesSection {
        /// Mirror half of the training images from left to right.
        flip: bool = false,
        /// Smallest part of each side that a random crop of a training image keeps; 1: no crop.
        #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
        crop: f64 = 1.0,
        /// Largest angle of a random rotation of training images in degrees, in both directions; 0: no rotation.
        #[schemars(range(min = 0.0, max = 180.0))]
        rotate: f64 = 0.0,
        /// Leave out images that cannot be read, and count them, instead of refusing the data.
        skip_broken: bool = false,
        /// Domain whose images are left out of training and held-out images, to measure on it later; empty: none.
        leave_out: String = String::new(),
        /// Draw as many images from each domain for every batch; the batch is a multiple of their number.
        balance_domains: bool = false,
    }
}

section! {
    /// Text, examples or images.
    DataSection {
        /// Files and folders of text; empty: the sources of the burn crates that Cargo downloaded.
        path: Vec<PathBuf> = Vec::new(),
        /// Format of the files.
        format: Format = Format::Auto,
        /// Field of JSON lines, or column of Parquet, that holds the text.
        field: String = "text".into(),
        /// Files and folders to measure on; empty: a part of the data, see `validation_fraction`.
        validation: Vec<PathBuf> = Vec::new(),
        /// Part of the documents held out for validation; not used with `validation`.
        #[schemars(extend("minimum" = 0.0, "maximum" = 1.0))]
        validation_fraction: f64 = 0.05,
        /// Keep attention inside a document.
        document_mask: bool = true,
        /// Train on prompts and the turns of others too, not only on completions and the assistant's turns.
        learn_prompt: bool = false,
        /// Pack several examples into a row of `seq_len` tokens, each seeing itself alone.
        packing: bool = false,
        /// Treatment of examples with more than `train.seq_len` tokens.
        too_long: TooLong = TooLong::Truncate,
        /// Check the hashes of all token files before the first step.
        verify: bool = true,
        /// Images, for a vision transformer.
        images: ImagesSection = ImagesSection::default(),
        /// Folder for what is made from the data: tokenizers, token shards, tokens of many examples.
        cache: PathBuf = PathBuf::from("runs/cache"),
    }
}

section! {
    /// From text to tokens.
    TokenizerSection {
        /// A `tokenizer.json`; `bytes`: byte level without a file; empty: a tokenizer trained on the data.
        path: String = String::new(),
        /// Vocabulary of a trained tokenizer.
        #[schemars(range(min = 1, max = 16_777_216))]
        vocab_size: usize = 4096,
    }
}

section! {
    /// Optimizer.
    OptimizerSection {
        /// Optimizer, one of `lowrank methods`.
        name: String = "adamw".into(),
        /// Peak learning rate.
        #[schemars(range(max = 1e6), extend("exclusiveMinimum" = 0.0))]
        lr: f64 = 3e-3,
        /// Decoupled weight decay of matrices.
        #[schemars(range(min = 0.0, max = 1e3))]
        weight_decay: f64 = 0.1,
        /// Global gradient clipping norm; 0: no clipping.
        #[schemars(range(min = 0.0, max = 1e30))]
        clip: f64 = 1.0,
        /// Per-block gradient clipping norm (not a global norm), with `train.backward = per-layer`; 0: no clipping.
        #[schemars(range(min = 0.0, max = 1e30))]
        block_clip: f64 = 0.0,
        /// Regular expression for paths of further matrices that the optimizer updates.
        include: String = String::new(),
        /// Regular expression for paths of matrices that AdamW updates instead.
        exclude: String = String::new(),
        /// Options of the optimizer; see `lowrank methods NAME`.
        options: Options = Options::new(),
    }
}

section! {
    /// Learning rate over time.
    ScheduleSection {
        /// Shape of the schedule; `cosine-restarts` is the default of parameterizations that restart.
        kind: ScheduleKind = ScheduleKind::Cosine,
        /// Steps of linear warm-up; 0: as `warmup_fraction` says.
        #[schemars(range(max = 1_000_000_000_000_u64))]
        warmup_steps: u64 = 100,
        /// Warm-up as a fraction of the run, when `warmup_steps` is 0.
        #[schemars(range(min = 0.0, max = 1.0))]
        warmup_fraction: f64 = 0.0,
        /// Last learning rate as a fraction of the peak.
        #[schemars(range(min = 0.0, max = 1.0))]
        final_fraction: f64 = 0.1,
        /// Fraction of the run over which `wsd` decays.
        #[schemars(range(min = 0.0, max = 1.0))]
        decay_fraction: f64 = 0.2,
        /// `cosine-restarts`: offset of the cosine schedule in steps, for a model that has already been trained.
        #[schemars(range(max = 1_000_000_000_000_u64))]
        adjust_steps: u64 = 0,
    }
}

section! {
    /// Steps and batches.
    TrainSection {
        /// Steps of the run; 0: no limit.
        #[schemars(range(max = 1_000_000_000_000_u64))]
        steps: u64 = 1800,
        /// Tokens of the run; 0: no limit.
        #[schemars(range(max = 1_000_000_000_000_000_000_u64))]
        tokens: u64 = 0,
        /// Passes over the data; 0: no limit, as where steps or tokens are given and this is not.
        #[schemars(range(min = 0.0, max = 1e6))]
        epochs: f64 = 0.0,
        /// Limit of time in minutes, resumes included, which the learning rate follows; 0: no limit, as where steps, tokens or epochs are given and this
        /// is not.
        #[schemars(range(min = 0.0, max = 1e7))]
        minutes: f64 = 10.0,
        /// Sequences in a micro-batch.
        #[schemars(range(min = 1, max = 65_536))]
        batch: usize = 4,
        /// Tokens in a sequence.
        #[schemars(range(min = 1, max = 16_777_216))]
        seq_len: usize = 256,
        /// Micro-batches in a step.
        #[schemars(range(min = 1, max = 65_536))]
        accumulation: usize = 1,
        /// Backward pass.
        backward: BackwardMode = BackwardMode::Whole,
        /// Memory limit of the process, e.g. `8GiB`, or `auto` for what the machine and its control group have free; settings left unset (parameterization, optimizer, backward mode, batch) are changed as little as possible to fit.
        memory: String = String::new(),
        /// Seed of weights, order and samples.
        seed: u64 = 42,
        /// `cpu`, or a GPU of a build with that feature: `cuda`, `vulkan`, `wgpu`, `metal`, `rocm`, with `:N` for the N-th card; `wgpu:cpu` for a software Vulkan driver.
        device: String = "cpu".into(),
        /// CPU threads; 0: one per core.
        #[schemars(range(max = 4096))]
        threads: usize = 0,
        /// Maximum number of steps with non-finite loss or gradients that may be skipped.
        max_skipped_steps: u64 = 0,
        /// Divide the optimizer's state among the processes of a run under MPI: each parameter's state is in one of them, which updates it and sends the result to the others. The weights are the same; one process holds all state.
        shard_state: bool = false,
    }
}

section! {
    /// Loss on held-out text.
    EvalSection {
        /// Steps between evaluations; 0: only at the end.
        every: u64 = 300,
        /// Batches of a validation loss, drawn once over all that is held out; 0: all; the end of a run is measured on all as well.
        batches: usize = 20,
    }
}

section! {
    /// Checkpoints.
    CheckpointSection {
        /// Steps between checkpoints; 0: only at the end.
        every: u64 = 300,
        /// Number of newest checkpoints to keep.
        #[schemars(range(min = 1, max = 1_000_000))]
        keep_last: usize = 2,
        /// Keep the checkpoint with the lowest validation loss as well.
        keep_best: bool = true,
        /// Type of the weights: f32, f16 or bf16. Where that rounds them, a checkpoint has the exact ones in a second file, from which a run goes on.
        #[schemars(extend("x-unset" = "the types in the files of the initial model, or f32"))]
        dtype: Option<FileType> = None,
    }
}

section! {
    /// What is written while training.
    LogSection {
        /// Steps between logged steps.
        #[schemars(range(min = 1))]
        every: u64 = 1,
        /// Write TensorBoard event files.
        tensorboard: bool = true,
        /// Steps between histograms of weights and gradients; 0: none.
        histograms_every: u64 = 0,
        /// Steps between samples of text; 0: before and after only.
        sample_every: u64 = 0,
        /// Tokens of a sample.
        #[schemars(range(max = 1_048_576))]
        sample_tokens: usize = 120,
        /// Start of a sample; empty: in a fine-tuning that of the first held-out example.
        sample_prompt: String = "//! ".into(),
    }
}
