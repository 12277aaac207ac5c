//! Trained factors of a layer's outputs or inputs ("Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
//! In-Context Learning", arXiv 2205.05638).

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::ground::targets::Expression;

/// `y = (x W + b) * l` with a factor for each output, or `y = (x * l) W + b` with one for each input at the layers that
/// end a feed-forward part.
#[derive(Module, Debug)]
pub struct Ia3 {
    /// Factors of the outputs `[1, d_out]`, or of the inputs `[d_in, 1]`; 1 at the start.
    pub l: Param<Tensor<2>>,
    #[module(skip)]
    inputs: bool,
}

/// Options of [`Ia3`].
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub struct Ia3Options {
    /// Layers whose inputs are scaled instead of their outputs: ends of their paths between commas, or a regular
    /// expression for whole paths.
    pub feedforward_modules: String,
}

impl Default for Ia3Options {
    fn default() -> Self {
        Self { feedforward_modules: "down_proj".into() }
    }
}

impl Ia3Options {
    /// Returns true if the inputs of this layer are scaled.
    fn scales_inputs(&self, path: &str) -> Result<bool, AdapterError> {
        let text = &self.feedforward_modules;
        let is_name = |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        if text.split(',').all(is_name) {
            return Ok(text.split(',').any(|name| !name.is_empty() && path.ends_with(name)));
        }
        Expression::new(&format!("^(?:{text})$"), text, "feedforward_modules")?.matches(path)
    }
}

impl Ia3 {
    /// The weight with its rows or columns scaled.
    fn scaled(&self, weight: Tensor<2>) -> Tensor<2> {
        weight * self.l.val()
    }
}

impl Structure for Ia3 {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        match self.inputs {
            true => base.forward(input.x * self.l.val().transpose()),
            false => base.forward(input.x) * self.l.val(),
        }
    }

    fn delta_weight(&self, weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.scaled(weight.clone()) - weight.clone())
    }

    fn merged_bias(&self, _weight: &Tensor<2>, bias: Option<Tensor<1>>) -> Option<Tensor<1>> {
        match self.inputs {
            true => bias,
            false => bias.map(|bias| bias * self.l.val().squeeze_dim(0)),
        }
    }

    fn unmerged(&self, merged: Tensor<2>) -> Option<Tensor<2>> {
        let factors = self.l.val().without_autodiff();
        let least = factors.clone().abs().min().into_scalar::<f32>();
        (least >= f32::MIN_POSITIVE).then(|| merged / factors)
    }
}

impl Method for Ia3 {
    type Options = Ia3Options;

    const LR: f64 = 3e-3;

    const SPEC: Spec = Spec {
        name: "ia3",
        title: "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        arxiv: "2205.05638",
        summary: "trains a factor of each output, or of each input of feed-forward layers",
        trains: "d_out; d_in at feedforward_modules",
        stores: "",
        dense_forward: false,
        rank: Rank::None,
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: true,
        tensors: &[TensorSpec { name: "l", role: TensorRole::Transform, transposed: true }],
    };

    fn check(options: &Ia3Options, place: &Place) -> Result<(), String> {
        options.scales_inputs(&place.path).map(|_| ()).map_err(|error| error.to_string())
    }

    fn build(options: &Ia3Options, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let [d_in, d_out] = site.place.shape;
        let inputs = options.scales_inputs(&site.place.path)?;
        let shape = if inputs { [d_in, 1] } else { [1, d_out] };
        Ok(Self { l: site.trained("l", shape, |_| Ok(vec![1.0; shape[0] * shape[1]]))?, inputs })
    }
}

#[cfg(test)]
mod tests {
    use crate::AdapterConfig;
    use crate::bench::{Bench, near};

    #[test]
    fn outputs_are_scaled_with_their_bias_and_inputs_at_the_end_of_a_feed_forward_part() {
        let bench = Bench::new(6, 4, true);
        for (modules, inputs) in [
            ("down_proj", false),
            ("down_proj,layer", true),
            ("la.*", true),
            ("a.*", false),
            ("(?!b)la.*", true),
            ("(?!l)la.*", false),
        ] {
            let config = AdapterConfig::new("ia3").with_option("feedforward_modules", modules);
            let moved = bench.moved(&config);
            let l = moved.tensor::<2>("l").autodiff();
            let expected = match inputs {
                true => bench.forward(bench.input(5) * l),
                false => bench.output() * l.transpose(),
            };
            near(moved.output(), expected, 1e-6);
            near(moved.merge().output(), moved.output(), 1e-5);
            let back = moved.adapter().structure().unmerged(moved.merged()).expect("no factor is 0");
            near(back, bench.weight(), 1e-6);
        }
    }

    #[test]
    fn a_factor_of_zero_cannot_be_taken_out() {
        let bench = Bench::new(6, 4, false);
        let mut tensors = bench.with(&AdapterConfig::new("ia3")).tensors();
        Bench::change(&mut tensors, "l", |place, _| if place == 2 { 0.0 } else { 1.5 });
        let gone = bench.with_tensors(&AdapterConfig::new("ia3"), tensors);
        assert!(gone.adapter().structure().unmerged(gone.merged()).is_none());
    }
}
