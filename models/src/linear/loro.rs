//! Two factors that periodically step along the manifold of their products ("Parameter and Memory Efficient Pretraining via Low-rank
//! Riemannian Optimization", ICLR 2025). The layer is [`LowRank`] with another initialisation; the difference lies in its steps.

use burn::tensor::Tensor;
use lowrank_optim::OptimError;
use lowrank_optim::loro::{Factors, LoroConfig, LoroSteps, exact_step};
use lowrank_optim::registry::{Built, Entry, Kind, OptionError, OptionList, Paper};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layer::{NamedLayer, layer_of};
use super::low_rank::LowRank;
use super::parameterization::{LinearMethod, ParameterizationSpec, RestartPlan, ends_before_restart, rank_fits};
use super::steps::{LinearSteps, OptimizerRequest, RunFacts, StateChange};
use crate::error::ModelError;
use crate::weights::{Builder, Init, trained};

/// Options of LORO.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoroOptions {
    /// Width between the factors, at most the smaller side of a layer. A run that is given none takes a quarter of the
    /// model's width.
    #[schemars(range(min = 1))]
    pub rank: usize,
    /// Updates K from one exact step along the manifold to the next; all moments are reset after it.
    #[schemars(range(min = 1))]
    pub exact_every: u64,
    /// Factor of the steps in between; -1 for the rank over the model's width.
    #[schemars(extend("anyOf" = [{ "const": -1 }, { "exclusiveMinimum": 0 }]))]
    pub lr_scaler: f64,
    /// Steps over which the learning rate comes back after an exact step.
    pub restart_warmup: u64,
}

impl Default for LoroOptions {
    fn default() -> Self {
        Self { rank: 128, exact_every: 500, lr_scaler: -1.0, restart_warmup: 5 }
    }
}

/// The layer is that of plain low rank.
pub type Loro = LowRank;

impl LinearMethod for LoroOptions {
    type Layer = Loro;

    fn spec() -> &'static ParameterizationSpec {
        const SPEC: &ParameterizationSpec = &ParameterizationSpec {
            period: Some("exact_every"),
            ..ParameterizationSpec::plain(Entry {
                options: || OptionList::of(&LoroOptions::default()),
                papers: &[Paper {
                    title: "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization",
                    place: "ICLR 2025",
                }],
                memory: "r (d_in + d_out)",
                ..Entry::plain(
                    Kind::Parameterization,
                    "loro",
                    "two factors with exact steps along the manifold of their products",
                )
            })
        };
        SPEC
    }

    fn check(&self) -> Result<(), OptionError> {
        ends_before_restart(self.restart_warmup, self.exact_every)
    }

    fn check_shape(&self, shape: [usize; 2]) -> Result<(), String> {
        rank_fits(self.rank, shape)
    }

    fn values(&self, [d_in, d_out]: [usize; 2]) -> usize {
        self.rank * (d_in + d_out)
    }

    fn kept(&self, _d_in: usize) -> usize {
        self.rank
    }

    /// All state is reset after an exact step, also during the first warm-up.
    fn restarts(&self) -> Option<RestartPlan> {
        Some(RestartPlan {
            every: self.exact_every,
            warmup_steps: self.restart_warmup,
            in_warmup: true,
            needs_zero_rate: false,
        })
    }

    fn steps(&self, run: RunFacts) -> Option<Box<dyn LinearSteps>> {
        let lr_scale = match self.lr_scaler {
            -1.0 => self.rank as f64 / run.width as f64,
            given => given,
        };
        Some(Box::new(ExactSteps { every: self.exact_every, lr_scale, handle: LoroSteps::default() }))
    }

    /// Both factors normal, of deviation `sqrt(2 / (rows + columns))`.
    fn build(
        &self,
        builder: &mut Builder,
        path: &str,
        shape @ [d_in, d_out]: [usize; 2],
    ) -> Result<LowRank, ModelError> {
        let xavier = |side: usize| Init::Normal((2.0 / (side + self.rank) as f64).sqrt());
        LowRank::at(builder, path, shape, self.rank, [xavier(d_in), xavier(d_out)])
    }
}

/// Exact steps of all layers of a model, after which all optimizer state is reset.
#[derive(Debug)]
struct ExactSteps {
    /// Updates from one exact step to the next.
    every: u64,
    /// Factor of the steps in between.
    lr_scale: f64,
    handle: LoroSteps,
}

impl LinearSteps for ExactSteps {
    fn optimizer(&self, request: &OptimizerRequest) -> Result<Built, OptimError> {
        let refused = |key: &str, value: &str, reason: &str| -> Result<Built, OptimError> {
            Err(OptionError::value(key, value, format!("with loro {reason}")).into())
        };
        let OptimizerRequest { method, include, exclude, .. } = request;
        if method.name != "adamw" {
            return refused("name", method.name, "exact steps are made of the moments of Adam; use adamw");
        }
        for (key, pattern) in [("include", include), ("exclude", exclude)] {
            if !pattern.is_empty() {
                return refused(key, pattern, "both factors of every layer are stepped together; remove it");
            }
        }
        let mut config = LoroConfig::new(self.lr_scale);
        let adam = OptionList::of(&config.adam);
        if let Some(key) = request.options.keys().find(|key| adam.get(key).is_none()) {
            let known: Vec<&str> = adam.iter().map(|option| option.name.as_str()).collect();
            let value = request.options[key].to_string();
            return refused(key, &value, &format!("adamw has the options {}; remove it", known.join(", ")));
        }
        config.adam = adam.configure("adamw", request.options)?;
        config.init(request.parameters, request.meter, &self.handle)
    }

    fn needs_all_states(&self) -> Option<String> {
        Some("an exact step of loro is made of the moments of both factors of a layer".into())
    }

    fn begin_step(&self, step: u64) {
        self.handle.begin_step(step.is_multiple_of(self.every));
    }

    /// Takes the exact steps whose directions the factors' optimizers have stored. If one fails, none is applied.
    fn after_update(&self, layers: Vec<NamedLayer>) -> Result<(), OptimError> {
        let mut pairs = Vec::new();
        for (path, layer) in layers {
            let Some(layer) = layer_of::<LowRank>(layer) else { continue };
            let first = self.handle.take(layer.a.id.val());
            let second = self.handle.take(layer.b.id.val());
            if let (Some((n, step)), Some((m, _))) = (first, second) {
                pairs.push(Pair { path, layer, directions: Factors { m: m.transpose(), n }, step });
            }
        }
        let stepped = pairs.par_iter().map(Pair::stepped).collect::<Result<Vec<Factors>, _>>()?;
        for (pair, Factors { m, n }) in pairs.into_iter().zip(stepped) {
            pair.layer.a = trained(pair.layer.a.id, n);
            pair.layer.b = trained(pair.layer.b.id, contiguous(m.transpose()));
        }
        Ok(())
    }

    fn end_step(&self, step: u64, _layers: Vec<NamedLayer>) -> StateChange {
        if step.is_multiple_of(self.every) { StateChange::Clear } else { StateChange::None }
    }
}

/// A layer whose pair of factors has directions: `W = M N^T` is the transposed weight, so that `N` is the first factor and `M` the transposed second.
struct Pair<'a> {
    path: String,
    layer: &'a mut LowRank,
    directions: Factors,
    step: f64,
}

impl Pair<'_> {
    fn stepped(&self) -> Result<Factors, OptimError> {
        let factors = Factors { m: self.layer.b.val().inner().transpose(), n: self.layer.a.val().inner() };
        exact_step(&factors, &self.directions, self.step).map_err(|error| match error {
            OptimError::Option(OptionError::Value { key, value, reason }) => {
                OptionError::value(key, value, format!("in {} {reason}", self.path)).into()
            }
            other => other,
        })
    }
}

/// A transposed matrix written out: a view would be copied at each product.
fn contiguous(x: Tensor<2>) -> Tensor<2> {
    let (data, device) = (x.to_data(), x.device());
    Tensor::from_data(data, &device)
}
