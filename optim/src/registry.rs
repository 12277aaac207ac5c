//! The list of optimizers: what the program offers, the documentation lists and the conformance tests run.

use std::collections::BTreeMap;
use std::fmt;

use burn::config::Config;
use burn::optim::{ModuleOptimizer, Optimizer};
use serde_json::Value;

use crate::{
    AdamW, AdamW8bitConfig, AdamWConfig, ApolloConfig, DctAdamWConfig, DionConfig, FiraConfig, FrugalConfig,
    GaLoreConfig, HiddenMatrices, LdAdamConfig, MomentResets, MuonConfig, OptimError, Place, StateMeter, Stepped,
    TrionConfig, check,
};

/// Where a method was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paper {
    /// Title.
    pub title: &'static str,
    /// arXiv id, or where else it is found.
    pub arxiv: &'static str,
}

/// One option of a method.
#[derive(Clone, Debug, PartialEq)]
pub struct OptionSpec {
    /// Name, as in `optimizer.NAME`.
    pub name: &'static str,
    /// Value when it is not given; none when it must be given.
    pub default: Option<OptionValue>,
    /// What it does and what it allows, one line.
    pub help: &'static str,
}

/// Value of an option.
#[derive(Clone, Debug, PartialEq)]
pub enum OptionValue {
    /// True or false.
    Flag(bool),
    /// A whole number.
    Count(i64),
    /// A number.
    Number(f64),
    /// A word.
    Text(String),
}

impl fmt::Display for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(value) => value.fmt(f),
            Self::Count(value) => value.fmt(f),
            Self::Number(value) if *value != 0.0 && value.abs() < 1e-3 => write!(f, "{value:e}"),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

impl OptionValue {
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(flag) => Some(Self::Flag(*flag)),
            Value::Number(number) => number.as_i64().map(Self::Count).or_else(|| number.as_f64().map(Self::Number)),
            Value::String(text) => Some(Self::Text(text.clone())),
            _ => None,
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Flag(value) => Value::from(*value),
            Self::Count(value) => Value::from(*value),
            Self::Number(value) => Value::from(*value),
            Self::Text(value) => Value::from(value.as_str()),
        }
    }
}

/// Options by name.
pub type Options = BTreeMap<String, OptionValue>;

/// What the configuration of every optimizer offers.
pub trait MethodConfig: Config {
    /// The bare optimizer.
    type Optimizer: Optimizer;

    /// Whether it is refused for modules without a hidden matrix that it takes.
    const NEEDS_MATRICES: bool = true;

    /// The bare optimizer, or why the configuration is refused.
    fn optimizer(&self) -> Result<Self::Optimizer, OptimError>;

    /// The optimizer of one matrix whose place among the others is known.
    fn at(optimizer: Self::Optimizer, place: Place) -> Self::Optimizer;

    /// Whether a matrix of this shape is stepped by the method and not by plain AdamW.
    fn takes(&self, shape: [usize; 2]) -> bool;

    /// AdamW of the same kind for everything else.
    fn others(&self) -> AdamWConfig;

    /// Bytes of state for a matrix of this shape.
    fn state_bytes(&self, shape: [usize; 2]) -> usize;
}

impl MethodConfig for AdamWConfig {
    type Optimizer = AdamW;

    const NEEDS_MATRICES: bool = false;

    fn optimizer(&self) -> Result<AdamW, OptimError> {
        self.validate()?;
        Ok(self.build())
    }

    fn at(optimizer: AdamW, _place: Place) -> AdamW {
        optimizer
    }

    fn takes(&self, _shape: [usize; 2]) -> bool {
        true
    }

    fn others(&self) -> AdamWConfig {
        self.clone().with_lr_scale(1.0)
    }

    fn state_bytes(&self, [rows, columns]: [usize; 2]) -> usize {
        8 * rows * columns
    }
}

/// An optimizer, and who steps each parameter.
pub type Built = (ModuleOptimizer, Vec<Stepped>);

/// One optimizer.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// Name on the command line.
    pub name: &'static str,
    /// Where it was published.
    pub paper: Paper,
    /// One line on what it does.
    pub summary: &'static str,
    /// State of an R x C matrix, in words.
    pub state: &'static str,
    /// Options that have to be given.
    required: &'static [&'static str],
    /// What its options do, in the order of the configuration.
    help: &'static [(&'static str, &'static str)],
    standard: fn() -> Value,
    check: fn(&Options, &Method) -> Result<(), OptimError>,
    bytes: fn(&Options, &Method, [usize; 2]) -> Result<usize, OptimError>,
    build: fn(&Options, &Method, &HiddenMatrices, &StateMeter) -> Result<Built, OptimError>,
    /// None where what a reset leaves of the state is not defined.
    resettable: Option<BuildResettable>,
}

type BuildResettable = fn(&Options, &Method, &HiddenMatrices, &StateMeter, &MomentResets) -> Result<Built, OptimError>;

/// Options of the projected side, of storage and of Adam that several methods share.
macro_rules! shared {
    (side) => {
        ("side", "projected side: std (the smaller; of a square the columns), std_left (of a square the rows), reverse_std, left, right")
    };
    (moments) => {
        ("moments", "storage of moments: f32, bf16, 8bit (low-rank matrices of less than 4096 values stay f32)")
    };
    (seed) => {
        ("seed", "seed of random subspaces")
    };
    (gap) => {
        ("update_proj_gap", "steps between choices of the subspace, at least 1")
    };
    (rank) => {
        ("rank", "vectors of the subspace, at least 1; a matrix whose projected side is smaller takes AdamW")
    };
    (beta_1) => {
        ("beta_1", "decay of the first moment, from 0 to below 1")
    };
    (beta_2) => {
        ("beta_2", "decay of the second moment, from 0 to below 1")
    };
    (epsilon) => {
        ("epsilon", "added to the root of the second moment, greater than 0")
    };
    (decay) => {
        ("weight_decay", "decoupled weight decay of matrices, 0 or greater")
    };
    (limit) => {
        ("growth_limit", "greatest growth of its norm from step to step, greater than 1; 0 for no limit")
    };
    (granularity) => {
        ("granularity", "scaling factors of a matrix: channel (one a row or column) or matrix (one)")
    };
    (momentum) => {
        ("momentum", "share of the used part that stays in the momentum, from 0 to below 1")
    };
    (ns_steps) => {
        ("ns_steps", "Newton-Schulz steps, at least 1")
    };
    (coefficients) => {
        ("coefficients", "of the Newton-Schulz iteration: jordan, or varying (at most 5 steps)")
    };
    (ns_bf16) => {
        ("ns_bf16", "whether the iteration's products are in bf16, as in the published code")
    };
    (scaling) => {
        ("scaling", "of the update by shape: kj, sqrt(max(1, d_out/d_in)); spectral, sqrt(d_out/d_in); rms, 0.2 sqrt(max); none")
    };
    (rows) => {
        ("rows_are_outputs", "whether matrices are stored [d_out, d_in], which Burn's are not")
    };
    (others) => {
        ("others_lr_scale", "learning rate of everything else as a multiple of that of the matrices")
    };
    (basis) => {
        ("basis", "orthonormal basis: dct3, dct2, or random")
    };
    (transform) => {
        ("transform", "how coefficients are computed, speed alone: fft or matmul")
    };
}

const GALORE: &[(&str, &str)] = &[
    shared!(rank),
    shared!(gap),
    ("scale", "factor of the projected update, greater than 0"),
    (
        "side",
        "projected side: std (the smaller; of a square the columns), std_left, reverse_std, left, right, full (both)",
    ),
    ("projector", "how directions are chosen: svd, dct, power, random"),
    shared!(moments),
    ("min_8bit_size", "smallest low-rank matrix with 8-bit moments, in values"),
    ("proj_bits", "bits of the stored projector: 4, 8, or 0 for f32"),
    ("proj_group", "values of the stored projector that share a scale"),
    ("weight_bits", "bits of the grid that weights are rounded to at random: 4, 8, or 0 for none"),
    ("lazy_queue", "renewals whose mean cosine decides on a longer gap; 0 keeps the gap"),
    ("cos_threshold", "mean cosine of the first direction from which the gap grows"),
    ("gap_growth", "factor by which the gap grows"),
    shared!(seed),
    shared!(beta_1),
    shared!(beta_2),
    shared!(epsilon),
    shared!(decay),
];

const APOLLO: &[(&str, &str)] = &[
    ("rank", "directions of the sketch; 0 takes a quarter of the smaller side"),
    shared!(granularity),
    ("scale", "its root multiplies the update; greater than 0"),
    ("scale_front", "whether scale acts before the limit of growth"),
    shared!(gap),
    ("projector", "how the sketch is made: gaussian, or svd"),
    shared!(limit),
    shared!(side),
    shared!(moments),
    shared!(seed),
    shared!(beta_1),
    shared!(beta_2),
    shared!(epsilon),
    shared!(decay),
];

const GALORE_PAPER: Paper =
    Paper { title: "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arxiv: "2403.03507" };
const DCT_PAPER: Paper = Paper {
    title: "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive Optimization of Large Language Models",
    arxiv: "2505.17967",
};
const APOLLO_PAPER: Paper = Paper { title: "APOLLO: SGD-like Memory, AdamW-level Performance", arxiv: "2412.05270" };

/// Fills in what follows from the type of a configuration.
macro_rules! method {
    (resettable $config:ty, $($rest:tt)*) => {
        Method {
            resettable: Some(|options, method, hidden, meter, resets| {
                let config = configured::<$config>(options, method)?;
                Ok((hidden.resettable(&config, meter, resets)?, hidden.report(&config, method.name)))
            }),
            ..method!($config, $($rest)*)
        }
    };
    ($config:ty, $standard:expr, $name:literal, $paper:expr, $summary:literal, $state:literal, $required:expr, $help:expr) => {
        Method {
            name: $name,
            paper: $paper,
            summary: $summary,
            state: $state,
            required: $required,
            help: $help,
            standard: || serde_json::to_value($standard).unwrap_or_default(),
            check: |options, method| configured::<$config>(options, method)?.optimizer().map(|_| ()),
            bytes: |options, method, shape| Ok(configured::<$config>(options, method)?.state_bytes(shape)),
            build: |options, method, hidden, meter| {
                let config = configured::<$config>(options, method)?;
                Ok((hidden.optimizer(&config, meter)?, hidden.report(&config, method.name)))
            },
            resettable: None,
        }
    };
}

/// All optimizers.
pub static METHODS: &[Method] = &[
    method!(
        resettable AdamWConfig,
        AdamWConfig::new().with_beta_2(0.95),
        "adamw",
        Paper { title: "Decoupled Weight Decay Regularization", arxiv: "1711.05101" },
        "Adam with decoupled weight decay, two full moments",
        "2 RC",
        &[],
        &[
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
            ("legacy_epsilon", "whether epsilon is added before the bias of the second moment is corrected"),
            ("decay_after", "whether weights decay after the update"),
            ("lr_scale", "learning rate of hidden matrices as a multiple of that of everything else"),
        ]
    ),
    method!(
        resettable AdamW8bitConfig,
        AdamW8bitConfig::new().with_beta_2(0.95),
        "adamw-8bit",
        Paper { title: "8-bit Optimizers via Block-wise Quantization", arxiv: "2110.02861" },
        "AdamW with moments of one byte in blocks; the embedding and the head keep f32",
        "2 RC bytes + 8 bytes a block",
        &[],
        &[
            ("block", "values that share a scale, a power of two from 64 to 4096"),
            ("min_8bit_size", "tensors of fewer values keep f32 moments"),
            ("keep_v_positive", "whether a positive second moment never becomes 0"),
            ("decay_before", "whether weights decay before the update"),
            ("lr_scale", "learning rate of hidden matrices as a multiple of that of everything else"),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
        ]
    ),
    method!(
        DctAdamWConfig,
        DctAdamWConfig::new(0),
        "dct-adamw",
        DCT_PAPER,
        "AdamW on the DCT coefficients that carry most of the gradient",
        "2 n_max r + r indices + rest (RC bytes)",
        &["rank"],
        &[
            shared!(rank),
            ("update_proj_gap", "steps between choices of basis vectors, at least 1"),
            shared!(side),
            ("shared_dim", "size of a side that is projected whatever side says; 0 for none"),
            shared!(basis),
            shared!(transform),
            ("norm", "score of a basis vector: l1 or l2"),
            ("weighted", "whether scores are multiplied with the norm of the basis vector"),
            ("rotate", "whether moments move with their basis vectors"),
            ("error_feedback", "what the projection leaves out: none, full, quantised"),
            ("error_levels", "steps of the quantisation, 1 to 255; up to 15 a value takes half a byte"),
            ("proj_lr_scale", "learning rate of projected matrices as a multiple of that of everything else"),
            ("max_shape", "matrices with a side of this size or more take AdamW"),
            shared!(moments),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
        ]
    ),
    method!(
        GaLoreConfig,
        GaLoreConfig::new(128),
        "galore",
        GALORE_PAPER,
        "Adam on the leading singular directions of the gradient",
        "2 n_max r + n_min r",
        &[],
        GALORE
    ),
    method!(
        GaLoreConfig,
        GaLoreConfig::eight_bit(128),
        "galore-8bit",
        GALORE_PAPER,
        "GaLore with moments of one byte",
        "2 n_max r bytes + n_min r",
        &[],
        GALORE
    ),
    method!(
        GaLoreConfig,
        GaLoreConfig::quantised(128),
        "q-galore",
        Paper {
            title: "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
            arxiv: "2407.08296",
        },
        "GaLore with 8-bit moments, a 4-bit projector, weights on an 8-bit grid and rarer renewals",
        "2 n_max r bytes + n_min r / 2 bytes",
        &[],
        GALORE
    ),
    method!(
        FiraConfig,
        FiraConfig::new(128),
        "fira",
        Paper {
            title: "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
            arxiv: "2410.01623",
        },
        "GaLore whose rest moves the weights too, scaled as Adam scaled the inside",
        "2 n_max r + n_min r",
        &[],
        &[
            shared!(rank),
            shared!(gap),
            ("scale", "factor of the projected update, greater than 0"),
            ("pure", "whether the rest is G - back(low), as in the paper, and not G - scale back(low), as in the code"),
            shared!(granularity),
            shared!(limit),
            shared!(side),
            ("projector", "how directions are chosen: svd, dct, power, random"),
            shared!(moments),
            shared!(seed),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
        ]
    ),
    method!(
        FrugalConfig,
        FrugalConfig::new(),
        "frugal",
        Paper {
            title: "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
            arxiv: "2411.07837",
        },
        "Adam on a share of the gradient, its sign for the rest",
        "2 density RC (+ indices); svd: 2 n_max r + n_min r; dct: 2 n_max r + r",
        &[],
        &[
            ("density", "share that has moments, from 0 (sign descent) to 1"),
            ("rank", "directions of svd, random and dct instead of a share; 0 takes density"),
            ("update_proj_gap", "steps between choices of the active part, at least 1"),
            ("projector", "the active part: block (whole matrices), columns, rows, randk, svd, random, randperm, dct"),
            ("block_order", "order of blocks: descending, ascending, random, mirror"),
            ("inactive_rule", "how the inactive part moves the weights: sign_sgd, sgd, no"),
            ("inactive_lr_scale", "learning rate of the inactive part as a multiple of that of the active one"),
            ("proj_lr_scale", "learning rate of projected matrices as a multiple of that of everything else"),
            ("reset_statistics", "whether moments start anew with the active part"),
            ("inner", "what works in the active part: adam, adam_legacy, lion, momentum"),
            shared!(side),
            shared!(moments),
            shared!(seed),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
        ]
    ),
    method!(
        LdAdamConfig,
        LdAdamConfig::new(16),
        "ldadam",
        Paper { title: "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics", arxiv: "2410.16103" },
        "Adam in a subspace that follows momentum and gradient at every step",
        "2 n_max r + n_min r + rest (RC)",
        &[],
        &[
            shared!(rank),
            ("rho", "share of the momentum in what the subspace follows, from 0 to below 1"),
            ("projector", "how the subspace follows: power, svd, dct"),
            ("proj_lr_scale", "learning rate of projected matrices as a multiple of that of everything else"),
            ("error_feedback", "whether what is lost comes back with the next gradient"),
            shared!(side),
            shared!(moments),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
            shared!(decay),
        ]
    ),
    method!(
        ApolloConfig,
        ApolloConfig::new(),
        "apollo",
        APOLLO_PAPER,
        "the gradient, each row or column scaled as Adam scales it in a random sketch",
        "2 n_max r",
        &[],
        APOLLO
    ),
    method!(
        ApolloConfig,
        ApolloConfig::mini(),
        "apollo-mini",
        APOLLO_PAPER,
        "the gradient, scaled by one factor from a sketch of one direction",
        "2 n_max",
        &[],
        APOLLO
    ),
    method!(
        TrionConfig,
        TrionConfig::new(0),
        "trion",
        DCT_PAPER,
        "momentum whose leading DCT columns are made orthogonal",
        "RC",
        &["rank"],
        &[
            shared!(rank),
            shared!(momentum),
            shared!(basis),
            shared!(transform),
            shared!(ns_steps),
            shared!(coefficients),
            shared!(ns_bf16),
            shared!(scaling),
            shared!(rows),
            shared!(decay),
            shared!(others),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
        ]
    ),
    method!(
        DionConfig,
        DionConfig::new(),
        "dion",
        Paper { title: "Dion: Distributed Orthonormalized Updates", arxiv: "2504.05295" },
        "orthonormal updates of low rank by power iteration on the momentum",
        "RC + n_min r",
        &[],
        &[
            ("rank", "directions; 0 takes rank_fraction"),
            ("rank_fraction", "directions as a share of the smaller side, above 0 to 1"),
            ("rank_multiple_of", "the share is rounded up to a multiple of this"),
            shared!(momentum),
            ("power_iters", "power iterations a step, at least 1"),
            ("right", "normalisation of the right factor: colnorm or qr"),
            ("norm_epsilon", "added to norms of columns, greater than 0"),
            shared!(scaling),
            shared!(rows),
            ("seed", "seed of the first right factor"),
            shared!(decay),
            shared!(others),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
        ]
    ),
    method!(
        resettable MuonConfig,
        MuonConfig::new(),
        "muon",
        Paper { title: "Muon: An optimizer for hidden layers in neural networks", arxiv: "2502.16982" },
        "momentum made orthogonal",
        "RC",
        &[],
        &[
            ("momentum", "decay of the momentum, from 0 to below 1"),
            ("momentum_rule", "how momentum gathers gradients: ema or heavy_ball"),
            ("nesterov", "whether the update looks one step ahead"),
            shared!(ns_steps),
            shared!(coefficients),
            shared!(ns_bf16),
            shared!(scaling),
            shared!(rows),
            shared!(decay),
            shared!(others),
            shared!(beta_1),
            shared!(beta_2),
            shared!(epsilon),
        ]
    ),
];

/// The configuration of a method with options on top of its defaults.
fn configured<C: MethodConfig>(options: &Options, method: &Method) -> Result<C, OptimError> {
    let mut values = (method.standard)();
    let mut config = None;
    for (option, _) in method.help {
        let Some(value) = options.get(*option) else { continue };
        values[*option] = value.json();
        // One at a time, so that a refusal names its option.
        match serde_json::from_value(values.clone()) {
            Ok(parsed) => config = Some(parsed),
            Err(error) => return check::refused(option, value, error.to_string()),
        }
    }
    match config {
        Some(config) => Ok(config),
        None => serde_json::from_value(values).map_err(|error| OptimError::Value {
            option: "optimizer",
            value: method.name.into(),
            reason: error.to_string(),
        }),
    }
}

/// The method of a name.
pub fn find(name: &str) -> Result<&'static Method, OptimError> {
    METHODS.iter().find(|method| method.name == name).ok_or_else(|| OptimError::UnknownMethod {
        name: name.to_string(),
        nearest: nearest(name, METHODS.iter().map(|method| method.name)),
        known: METHODS.iter().map(|method| method.name).collect::<Vec<_>>().join(", "),
    })
}

impl Method {
    /// Its options with their defaults.
    pub fn options(&self) -> Vec<OptionSpec> {
        let standard = (self.standard)();
        let spec = |(name, help): &(&'static str, &'static str)| OptionSpec {
            name,
            default: OptionValue::of(&standard[*name]).filter(|_| !self.required.contains(name)),
            help,
        };
        self.help.iter().map(spec).collect()
    }

    /// Checks names and values of options.
    pub fn check(&self, given: &Options) -> Result<(), OptimError> {
        for name in given.keys() {
            if self.help.iter().all(|(option, _)| option != name) {
                return Err(OptimError::UnknownOption {
                    method: self.name.to_string(),
                    option: name.clone(),
                    nearest: nearest(name, self.help.iter().map(|(option, _)| *option)),
                    known: self.help.iter().map(|(option, _)| *option).collect::<Vec<_>>().join(", "),
                });
            }
        }
        for (option, help) in self.help {
            if self.required.contains(option) && !given.contains_key(*option) {
                return check::refused(option, "not given", format!("{} needs it: {help}", self.name));
            }
        }
        (self.check)(given, self)
    }

    /// Bytes of state for a matrix of this shape.
    pub fn state_bytes(&self, given: &Options, shape: [usize; 2]) -> Result<usize, OptimError> {
        (self.bytes)(given, self, shape)
    }

    /// As [`Method::init`], of an optimizer whose moments can be set back through the handle.
    pub fn init_resettable(
        &self,
        given: &Options,
        hidden: &HiddenMatrices,
        meter: &StateMeter,
        resets: &MomentResets,
    ) -> Result<Built, OptimError> {
        self.check(given)?;
        let Some(build) = self.resettable else {
            let known: Vec<&str> = METHODS.iter().filter(|m| m.resettable.is_some()).map(|m| m.name).collect();
            let reason = "its moments live in a subspace of their own, and what a reset leaves of them is not defined";
            return check::refused("optimizer", self.name, format!("{reason}; take {}", known.join(", ")));
        };
        build(given, self, hidden, meter, resets)
    }

    /// The optimizer for the parameters of a module, whose states report to the meter, and who steps each parameter.
    pub fn init(&self, given: &Options, hidden: &HiddenMatrices, meter: &StateMeter) -> Result<Built, OptimError> {
        self.check(given)?;
        (self.build)(given, self, hidden, meter)
    }
}

/// The known name with the fewest edits, when that is few enough to be a slip.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    known
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .min()
        .filter(|(edits, candidate)| *edits <= 1 + candidate.len() / 3)
        .map(|(_, candidate)| candidate.to_string())
}

#[cfg(test)]
mod tests;
