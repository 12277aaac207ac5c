//! Which parameterization the linear layers of the blocks have.

use lowrank_optim::Keep;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// How the factors of a plain low-rank layer begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LowRankInit {
    /// The best approximation of an ordinary dense beginning.
    Spectral,
    /// Normal draws, the first factor of deviation `1 / sqrt(d_in)`, the second of `1 / sqrt(rank)`.
    Gaussian,
    /// The first factor uniform, the second zero: every block begins silent.
    Lora,
}

/// What the linear layers of the blocks hold; the embedding, the head and the norms are always dense.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Parameterization {
    /// A dense weight.
    #[default]
    Dense,
    /// Two factors.
    LowRank {
        /// Width between the factors.
        rank: usize,
        /// How they begin.
        init: LowRankInit,
    },
    /// Two factors and a sparse matrix.
    #[serde(rename = "sltrain")]
    SlTrain {
        /// Width between the factors.
        rank: usize,
        /// The product of the factors is scaled by `alpha / rank`.
        alpha: f64,
        /// Share of the weight's positions in the sparse matrix.
        density: f64,
        /// Whether the scale is trained instead.
        trained_scale: bool,
    },
    /// Two factors with a non-linearity between them.
    Cola {
        /// Width between the factors.
        rank: usize,
        /// Whether the feed-forward part keeps the non-linearity of its gate, as the small models of the paper do.
        keep_gate: bool,
    },
    /// Two factors with a non-linearity, and whole input channels.
    Lost {
        /// Width between the factors.
        rank: usize,
        /// Share of the input channels.
        density: f64,
        /// Weight of the factors against the channels.
        gamma: f64,
    },
    /// A frozen weight and two factors that are added to it again and again.
    #[serde(rename = "relora")]
    ReLora {
        /// Width between the factors.
        rank: usize,
        /// The product of the factors is scaled by `alpha / rank`.
        alpha: f64,
        /// Updates from one restart to the next.
        reset_every: u64,
        /// Steps over which the learning rate comes back after a restart.
        restart_warmup: u64,
        /// What a restart leaves of the factors' moments.
        reset: Keep,
        /// Whether the scale is trained instead.
        trained_scale: bool,
    },
    /// Two factors that now and then step along the manifold of their products.
    Loro {
        /// Width between the factors.
        rank: usize,
        /// Updates from one exact step to the next.
        exact_every: u64,
        /// Factor of the steps between; -1 for the rank over the width of the model.
        lr_scaler: f64,
        /// Steps over which the learning rate comes back after an exact step.
        restart_warmup: u64,
    },
}

/// A method as the program lists it.
#[derive(Clone, Copy, Debug)]
pub struct ParameterizationMethod {
    /// Name on the command line.
    pub name: &'static str,
    /// Title of the paper.
    pub title: &'static str,
    /// arXiv id, or where else it is found.
    pub arxiv: &'static str,
    /// What a `d_in x d_out` weight becomes, in values.
    pub values: &'static str,
    /// Whether the learning rate falls to 0 and comes back with it, unless another schedule is asked for.
    pub restarts: bool,
    /// Its options with their defaults and what they allow.
    pub options: &'static [(&'static str, &'static str, &'static str)],
}

/// All parameterizations.
pub static PARAMETERIZATIONS: &[ParameterizationMethod] = &[
    ParameterizationMethod {
        name: "dense",
        title: "LLaMA: Open and Efficient Foundation Language Models",
        arxiv: "2302.13971",
        values: "d_in d_out",
        restarts: false,
        options: &[],
    },
    ParameterizationMethod {
        name: "low_rank",
        title: "Exploring Low Rank Training of Deep Neural Networks",
        arxiv: "2209.13569",
        values: "r (d_in + d_out)",
        restarts: false,
        options: &[
            ("rank", "128", "width between the factors, 1 to the smaller side"),
            ("init", "spectral", "spectral, gaussian or lora (second factor 0)"),
        ],
    },
    ParameterizationMethod {
        name: "sltrain",
        title: "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        arxiv: "2406.02214",
        values: "r (d_in + d_out) + k, and k positions of 4 bytes; k = density d_in d_out",
        restarts: false,
        options: &[
            ("rank", "128", "width between the factors, 1 to the smaller side"),
            ("alpha", "32", "the product of the factors is scaled by alpha / rank; greater than 0"),
            ("density", "0.03", "share of positions in the sparse part, above 0 and below 1"),
            ("trained_scale", "false", "whether a trained tanh(q) stands in place of alpha / rank"),
        ],
    },
    ParameterizationMethod {
        name: "cola",
        title: "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation",
        arxiv: "2502.10940",
        values: "r (d_in + d_out)",
        restarts: false,
        options: &[
            ("rank", "128", "width between the factors, at least 1"),
            ("keep_gate", "true", "whether the feed-forward part keeps its own non-linearity"),
        ],
    },
    ParameterizationMethod {
        name: "lost",
        title: "LOST: Low-rank and Sparse Pre-training for Large Language Models",
        arxiv: "2508.02668",
        values: "r (d_in + d_out) + k d_out, and k channels; k = density d_in",
        restarts: false,
        options: &[
            ("rank", "128", "width between the factors, 1 to the smaller side"),
            ("density", "0.03", "share of input channels, above 0 and below 1"),
            ("gamma", "0.7", "weight of the factors against the channels, from 0 to 1"),
        ],
    },
    ParameterizationMethod {
        name: "relora",
        title: "ReLoRA: High-Rank Training Through Low-Rank Updates",
        arxiv: "2307.05695",
        values: "d_in d_out frozen, r (d_in + d_out) trained",
        restarts: true,
        options: &[
            ("rank", "128", "width between the factors, 1 to the smaller side"),
            ("alpha", "32", "the product of the factors is scaled by alpha / rank; greater than 0"),
            (
                "reset_every",
                "5000",
                "updates T from one restart to the next; restarts follow updates T + 1, 2 T + 1, ...",
            ),
            (
                "restart_warmup",
                "100",
                "steps over which the learning rate comes back after a restart, fewer than reset_every",
            ),
            (
                "reset",
                "zero",
                "what a restart makes of the factors' moments: zero; magnitude:Q keeps those above the Q-quantile; random:Q keeps each with chance 1 - Q",
            ),
            ("trained_scale", "false", "whether a trained tanh(q) stands in place of alpha / rank"),
        ],
    },
    ParameterizationMethod {
        name: "loro",
        title: "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization",
        arxiv: "ICLR 2025",
        values: "r (d_in + d_out)",
        restarts: true,
        options: &[
            ("rank", "128", "width between the factors, 1 to the smaller side"),
            (
                "exact_every",
                "500",
                "updates K from one exact step along the manifold to the next; all moments begin anew after it",
            ),
            ("lr_scaler", "-1", "factor of the steps between, greater than 0; -1 for the rank over the model's width"),
            ("restart_warmup", "5", "steps over which the learning rate comes back after an exact step"),
        ],
    },
];

/// Values of the sparse part: a whole number of positions, never rounded up.
pub(super) fn entries(density: f64, d_in: usize, d_out: usize) -> usize {
    (density * (d_in * d_out) as f64) as usize
}

/// Channels of the sparse part; at least one.
pub(super) fn channels(density: f64, d_in: usize) -> usize {
    ((density * d_in as f64).round() as usize).max(1)
}

impl Parameterization {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::LowRank { .. } => "low_rank",
            Self::SlTrain { .. } => "sltrain",
            Self::Cola { .. } => "cola",
            Self::Lost { .. } => "lost",
            Self::ReLora { .. } => "relora",
            Self::Loro { .. } => "loro",
        }
    }

    /// Whether the SwiGLU part keeps the non-linearity of its gate.
    pub fn keeps_gate(&self) -> bool {
        !matches!(self, Self::Cola { keep_gate: false, .. })
    }

    /// Values that are trained in place of a weight `[d_in, d_out]`.
    pub fn values(&self, d_in: usize, d_out: usize) -> usize {
        match self {
            Self::Dense => d_in * d_out,
            Self::LowRank { rank, .. } | Self::Cola { rank, .. } | Self::Loro { rank, .. } => rank * (d_in + d_out),
            Self::SlTrain { rank, density, trained_scale, .. } => {
                rank * (d_in + d_out) + entries(*density, d_in, d_out) + usize::from(*trained_scale)
            }
            Self::Lost { rank, density, .. } => rank * (d_in + d_out) + channels(*density, d_in) * d_out,
            Self::ReLora { rank, trained_scale, .. } => rank * (d_in + d_out) + usize::from(*trained_scale),
        }
    }

    /// Positions that are stored in place of a weight `[d_in, d_out]`.
    pub fn positions(&self, d_in: usize, d_out: usize) -> usize {
        match self {
            Self::SlTrain { density, .. } => entries(*density, d_in, d_out),
            Self::Lost { density, .. } => channels(*density, d_in),
            _ => 0,
        }
    }

    /// Values that the forward pass of a layer keeps for the backward pass beside its input, for each row of it, on the CPU backend.
    pub fn kept(&self, d_in: usize) -> usize {
        match self {
            Self::Dense | Self::SlTrain { .. } => 0,
            Self::LowRank { rank, .. } | Self::ReLora { rank, .. } | Self::Loro { rank, .. } => *rank,
            Self::Cola { rank, .. } => 3 * rank,
            Self::Lost { rank, density, .. } => 3 * rank + channels(*density, d_in),
        }
    }

    /// Refuses values that no layer can have.
    pub fn validate(&self) -> Result<(), ModelError> {
        let refuse = |what: &str, value: f64, reason: &str| {
            Err(ModelError::Config(format!("{} with {what} = {value}: {reason}", self.name())))
        };
        match self {
            Self::LowRank { rank: 0, .. }
            | Self::SlTrain { rank: 0, .. }
            | Self::Cola { rank: 0, .. }
            | Self::Lost { rank: 0, .. }
            | Self::ReLora { rank: 0, .. }
            | Self::Loro { rank: 0, .. } => refuse("rank", 0.0, "it must be at least 1"),
            Self::SlTrain { alpha, .. } | Self::ReLora { alpha, .. } if !(*alpha > 0.0 && alpha.is_finite()) => {
                refuse("alpha", *alpha, "it must be greater than 0")
            }
            Self::SlTrain { density, .. } | Self::Lost { density, .. } if !(*density > 0.0 && *density < 1.0) => {
                refuse("density", *density, "it must be above 0 and below 1")
            }
            Self::Lost { gamma, .. } if !(0.0..=1.0).contains(gamma) => {
                refuse("gamma", *gamma, "it must be from 0 to 1")
            }
            Self::Loro { exact_every: 0, .. } => refuse("exact_every", 0.0, "it must be at least 1"),
            Self::Loro { lr_scaler, .. } if *lr_scaler != -1.0 && !(*lr_scaler > 0.0 && lr_scaler.is_finite()) => {
                refuse("lr_scaler", *lr_scaler, "it must be greater than 0, or -1 for the rank over the model's width")
            }
            Self::ReLora { reset_every: 0, .. } => refuse("reset_every", 0.0, "it must be at least 1"),
            Self::ReLora { reset_every: every, restart_warmup, .. }
            | Self::Loro { exact_every: every, restart_warmup, .. }
                if restart_warmup >= every =>
            {
                let reason = format!("it must be smaller than the {every} updates from one restart to the next");
                refuse("restart_warmup", *restart_warmup as f64, &reason)
            }
            Self::ReLora { reset, .. } => {
                reset.validate().map_err(|error| ModelError::Config(format!("relora with {error}")))
            }
            _ => Ok(()),
        }
    }

    /// Refuses what a weight of this shape cannot be.
    pub(super) fn check_shape(&self, path: &str, d_in: usize, d_out: usize) -> Result<(), ModelError> {
        let refuse = |reason: String| Err(ModelError::Config(format!("{path}, {d_in} x {d_out}: {reason}")));
        match self {
            Self::LowRank { rank, .. }
            | Self::SlTrain { rank, .. }
            | Self::Lost { rank, .. }
            | Self::ReLora { rank, .. }
            | Self::Loro { rank, .. }
                if *rank > d_in.min(d_out) =>
            {
                refuse(format!("rank {rank} is larger than its smaller side, {}", d_in.min(d_out)))
            }
            Self::SlTrain { density, .. } if entries(*density, d_in, d_out) == 0 => {
                refuse(format!("density {density} of its {} positions is less than one", d_in * d_out))
            }
            _ if d_in * d_out > i32::MAX as usize => {
                refuse("positions of 32 bits do not suffice for so large a weight".into())
            }
            _ => Ok(()),
        }
    }
}
