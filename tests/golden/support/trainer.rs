//! Parameters of a case stepped by AdamW.

use burn::optim::Optimizer;
use burn::tensor::Tensor;
use lowrank_optim::{AdamW, AdamWConfig};

use super::case::Case;

/// AdamW on several tensors of a case.
pub struct Trainer {
    optimizer: AdamW,
    two: Vec<Option<lowrank_optim::AdamWState<2>>>,
    one: Option<lowrank_optim::AdamWState<1>>,
}

impl Trainer {
    pub fn new(case: &Case) -> Result<Self, String> {
        let betas = case.config["betas"].as_array().ok_or("configuration: betas")?;
        let beta = |place: usize| betas[place].as_f64().ok_or("configuration: betas");
        let optimizer = AdamWConfig::new()
            .with_beta_1(beta(0)?)
            .with_beta_2(beta(1)?)
            .with_epsilon(case.number("eps")?)
            .with_weight_decay(case.number("weight_decay")?)
            .build();
        Ok(Self { optimizer, two: vec![None, None], one: None })
    }

    pub fn matrix(&mut self, place: usize, lr: f64, w: Tensor<2>, g: Tensor<2>) -> Tensor<2> {
        let (w, state) = self.optimizer.step(lr, w.inner(), g, self.two[place].take());
        self.two[place] = state;
        w.autodiff().require_grad()
    }

    pub fn vector(&mut self, lr: f64, w: Tensor<1>, g: Tensor<1>) -> Tensor<1> {
        let (w, state) = self.optimizer.step(lr, w.inner(), g, self.one.take());
        self.one = state;
        w.autodiff().require_grad()
    }
}
