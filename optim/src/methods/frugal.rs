//! Adam on a part of the gradient, its sign for the remaining part.

use burn::config::Config;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::adam::AdamOptions;
use crate::projected::config::{BlockOrder, Inner, OnRenewal, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::projected::named::named;
use crate::registry::entry::{Entry, Kind, Paper};
use crate::registry::method::{Method, method};
use crate::state::moments::MomentType;

/// Update rule of the inactive part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum InactiveRule {
    /// By its sign.
    SignSgd,
    /// By itself.
    Sgd,
    /// Not at all.
    No,
}

/// Configuration of FRUGAL: "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training" (Zmushko et al., arXiv
/// 2411.07837).
///
/// A share of the projected matrices' gradient has Adam's moments, the rest moves the weights by its sign. The share changes every `update_proj_gap`
/// steps, when the moments are reset. `projector = block`, whole matrices in turn, has to know how many there are: build it with
/// [`ParameterRoles::optimizer`](crate::ParameterRoles::optimizer).
#[derive(Config, Debug, JsonSchema)]
pub struct FrugalConfig {
    /// Share of the gradient with moments (the paper's rho); 0 is sign descent.
    #[config(default = 0.25)]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub density: f64,
    /// Rank of the projectors svd, random and dct; 0 derives it from `density`.
    #[config(default = 0)]
    #[schemars(range(max = 1_000_000))]
    pub rank: usize,
    /// Steps between choices of the active part.
    #[config(default = 200)]
    #[schemars(range(min = 1))]
    pub update_proj_gap: usize,
    /// Active part.
    #[config(default = "ProjectorKind::Block")]
    #[schemars(extend("enum" = ["block", "columns", "rows", "randk", "svd", "random", "randperm", "dct"]))]
    pub projector: ProjectorKind,
    /// Order in which blocks become active.
    #[config(default = "BlockOrder::Descending")]
    pub block_order: BlockOrder,
    /// Update of the inactive part.
    #[config(default = "InactiveRule::SignSgd")]
    pub inactive_rule: InactiveRule,
    /// Learning rate of the inactive part as a multiple of that of the active one.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub inactive_lr_scale: f64,
    /// Learning rate of projected matrices as a multiple of that of all other parameters.
    #[config(default = 1.0)]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub proj_lr_scale: f64,
    /// Reset the moments when the active part changes.
    #[config(default = true)]
    pub reset_statistics: bool,
    /// Optimizer of the active part.
    #[config(default = "Inner::Adam")]
    pub inner: Inner,
    /// Projected side of a matrix.
    #[config(default = "Side::Std")]
    #[schemars(extend("enum" = ["std", "std_left", "reverse_std", "left", "right"]))]
    pub side: Side,
    /// Storage of moments.
    #[config(default = "MomentType::F32")]
    pub moments: MomentType,
    /// Seed of random subspaces.
    #[config(default = 0)]
    pub seed: u64,
    /// Options of Adam.
    #[config(default = "AdamOptions::new()")]
    pub adam: AdamOptions,
}

impl FrugalConfig {
    /// Its components.
    pub fn projected(&self) -> ProjectedConfig {
        ProjectedConfig::new(self.rank)
            .with_density(self.density)
            .with_update_proj_gap(self.update_proj_gap)
            .with_projector(self.projector)
            .with_block_order(self.block_order)
            .with_residual(match self.inactive_rule {
                InactiveRule::SignSgd => Residual::Sign,
                InactiveRule::Sgd => Residual::Sgd,
                InactiveRule::No => Residual::None,
            })
            .with_inactive_lr_scale(self.inactive_lr_scale)
            .with_proj_lr_scale(self.proj_lr_scale)
            .with_on_renewal(if self.reset_statistics { OnRenewal::Reset } else { OnRenewal::Keep })
            .with_inner(self.inner)
            .with_side(self.side)
            .with_moments(self.moments)
            .with_seed(self.seed)
            .with_adam(self.adam)
    }
}

/// Registry entry.
pub(crate) const METHOD: Method = method!(
    FrugalConfig,
    FrugalConfig::new(),
    Entry {
        papers: &[Paper {
            title: "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
            place: "2411.07837"
        }],
        memory: "2 density RC (+ indices); svd: 2 n_max r + n_min r; dct: 2 n_max r + r",
        needs: &["hidden matrices"],
        ..Entry::plain(Kind::Optimizer, "frugal", "Adam on a share of the gradient, sign descent for the remainder")
    }
);

named!(FrugalConfig);
