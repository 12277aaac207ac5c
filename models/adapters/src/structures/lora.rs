//! Low-rank adaptation ("LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685): a trained product
//! added to a frozen weight.
//!
//! The adapter is Burn's own [`LoraAdapter`]; this file adds the factored forward pass, the initialisations of `peft`
//! and the interface of a structure.

use burn::module::LoraAdapter;

use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};
use crate::init::factors as init;

/// LoRA has no options beyond rank, alpha, scaling, dropout and start.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
pub struct NoOptions;

impl Structure for LoraAdapter {
    fn factors(&self) -> Option<Factors> {
        Some(Factors { a: self.a.val(), b: self.b.val(), scale: self.scale })
    }
}

impl Method for LoraAdapter {
    type Options = NoOptions;

    const SPEC: Spec = Spec {
        name: "lora",
        title: "LoRA: Low-Rank Adaptation of Large Language Models",
        arxiv: "2106.09685",
        summary: "trains a product of two factors in addition to a frozen weight",
        trains: "r (d_in + d_out)",
        stores: "",
        dense_forward: false,
        rank: Rank::Fixed(8),
        alpha: Alpha::Ranks(1.0),
        scaling: Scaling::Rank,
        inits: init::OF_FACTORS,
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "a", role: TensorRole::A, transposed: true },
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
        ],
    };

    fn check(_options: &NoOptions, place: &Place) -> Result<(), String> {
        init::check(place)
    }

    fn build(_options: &NoOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let start = init::start(site)?;
        Ok(Self {
            a: site.trained("a", [d_in, rank], |_| Ok(start.a))?,
            b: site.trained("b", [rank, d_out], |_| Ok(start.b))?,
            scale: site.place.scale,
        })
    }

    fn resized(&self, keep: &[usize], site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let appended = rank - keep.len();
        // A different random stream than that of the first components.
        let what = format!("a.{}.{}", self.a.dims()[1], rank);
        let start = |site: &mut Site<'_>| site.uniform(&what, d_in * appended, (d_in as f64).sqrt().recip());
        Ok(Self {
            a: site.resized(&self.a, [d_in, rank], 1, keep, start),
            b: site.resized(&self.b, [rank, d_out], 0, keep, |_| vec![0.0; appended * d_out]),
            scale: self.scale,
        })
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::Tensor;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near, wave};

    fn config(rank: usize, scaling: Scaling) -> AdapterConfig {
        AdapterConfig { scaling: Some(scaling), ..AdapterConfig::new("lora").with_rank(rank).with_alpha(8.0) }
    }

    #[test]
    fn alpha_is_divided_by_the_rank_or_its_root() {
        let scale = |rank, scaling| {
            let attached = Bench::new(16, 16, false).with(&config(rank, scaling)).adapter();
            let Some(lora) = attached.structure.downcast_ref::<LoraAdapter>() else { unreachable!() };
            lora.scale
        };
        assert_eq!([4, 8].map(|rank| scale(rank, Scaling::Rank)), [2.0, 1.0]);
        assert!((scale(4, Scaling::RootRank) / scale(8, Scaling::RootRank) - 2f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_order_of_the_ranks_does_not_count() {
        let bench = Bench::new(9, 6, false).moved(&config(3, Scaling::Rank));
        let mut tensors = bench.tensors();
        let order = [2, 0, 1];
        let [a, b] = ["a", "b"].map(|field| bench.values(field));
        Bench::change(&mut tensors, "a", |place, _| a[order[place / 9] * 9 + place % 9]);
        Bench::change(&mut tensors, "b", |place, _| b[place / 3 * 3 + order[place % 3]]);
        let other = Bench::new(9, 6, false).with_tensors(&config(3, Scaling::Rank), tensors);
        near(other.output(), bench.output(), 1e-6);
    }

    /// Mean fraction of the output's gradient that one SGD step subtracts from the output, over initialisations.
    fn taken(rank: usize, scaling: Scaling) -> f64 {
        let (x, target) = (wave([1, 64], 5), wave([1, 4], 6));
        let bare = Bench::of(Tensor::zeros([64, 4], &Default::default()), None);
        let shares = (0..50).map(|seed| {
            let bench = bare.with(&AdapterConfig { seed, ..config(rank, scaling) });
            let loss = (bench.forward(x.clone()) * target.clone()).sum();
            let grads = GradientsParams::from_grads(loss.backward(), &bench);
            let bench = SgdConfig::new().init().step(1e-3, bench, grads);
            let along = (bench.forward(x.clone()) * target.clone()).sum() / target.clone().square().sum();
            f64::from((along / x.clone().square().sum()).into_scalar::<f32>()) / -1e-3
        });
        shares.sum::<f64>() / 50.0
    }

    #[test]
    fn the_root_of_the_rank_keeps_the_size_of_a_step() {
        for rank in [4, 16] {
            let scales = [(Scaling::Rank, 8.0 / rank as f64), (Scaling::RootRank, 8.0 / (rank as f64).sqrt())];
            for (scaling, scale) in scales {
                let expected = scale * scale * rank as f64 / (3.0 * 64.0);
                let ratio = taken(rank, scaling) / expected;
                assert!((0.8..1.2).contains(&ratio), "rank {rank}: {ratio}");
            }
        }
    }
}
