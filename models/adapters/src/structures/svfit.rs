//! Trained largest singular values of a weight ("SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models
//! Using Singular Values", arXiv 2409.05926). Written from the abstract and published summaries; no code of the authors
//! was found.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_optim::thin_svd;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::linear;

/// `y = x W + ((x V) * (sigma - sigma_0)) U` with the leading singular directions of W: the output of the layer is
/// unchanged at the start, bit for bit.
#[derive(Module, Debug)]
pub struct SvFit {
    /// Directions at the output `[rank, d_out]`.
    pub u: Param<Tensor<2>>,
    /// Directions at the input `[d_in, rank]`.
    pub vt: Param<Tensor<2>>,
    /// Singular values of the weight `[rank]`.
    pub sigma_0: Param<Tensor<1>>,
    /// Trained singular values `[rank]`.
    pub sigma: Param<Tensor<1>>,
}

/// Options of [`SvFit`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct SvFitOptions {
    /// Fraction of the squared singular values that the trained ones hold at least; picks the rank of each layer.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0, "x-unset" = "off"))]
    pub energy: Option<f64>,
}

impl SvFit {
    /// Change of the values, `[1, rank]`.
    fn moved(&self) -> Tensor<2> {
        (self.sigma.val() - self.sigma_0.val()).unsqueeze()
    }
}

impl Structure for SvFit {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus(input, |x| linear(linear(x, self.vt.val()) * self.moved(), self.u.val()))
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some((self.vt.val() * self.moved()).matmul(self.u.val()))
    }

    fn as_factors(&self) -> Option<[Tensor<2>; 2]> {
        Some([self.vt.val() * self.moved(), self.u.val()])
    }
}

impl Method for SvFit {
    type Options = SvFitOptions;

    const LR: f64 = 1e-3;

    const SPEC: Spec = Spec {
        name: "svfit",
        title: "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
        arxiv: "2409.05926",
        summary: "trains the largest singular values",
        trains: "r",
        stores: "r (d_in + d_out + 1)",
        dense_forward: false,
        rank: Rank::SmallerSide(usize::MAX),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "u", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "vt", role: TensorRole::Frozen, transposed: true },
            TensorSpec { name: "sigma_0", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "sigma", role: TensorRole::Vector, transposed: false },
        ],
    };

    fn check(options: &SvFitOptions, place: &Place) -> Result<(), String> {
        place.check_rank()?;
        let [d_in, d_out] = place.shape;
        match options.energy {
            Some(energy) if place.rank != d_in.min(d_out) => {
                Err(format!("energy = {energy} picks the rank; take rank {} away", place.rank))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &SvFitOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], mut rank) = (site.place.shape, site.place.rank);
        let mut start = (Vec::new(), Vec::new(), Vec::new());
        if site.is_given() {
            let sigma = site.given_shape("sigma").filter(|_| options.energy.is_some());
            rank = sigma.map_or(rank, |shape| shape.iter().product());
        } else {
            let svd = thin_svd(&site.weight().transpose(), rank);
            if let Some(energy) = options.energy {
                rank = rank_of(&svd.values, energy);
            }
            start = (
                host(svd.left.slice([0..d_out, 0..rank]).transpose()),
                host(svd.right.slice([0..d_in, 0..rank])),
                svd.values[..rank].iter().map(|value| *value as f32).collect(),
            );
        }
        let (u, vt, sigma) = start;
        Ok(Self {
            u: site.frozen("u", [rank, d_out], |_| Ok(u))?,
            vt: site.frozen("vt", [d_in, rank], |_| Ok(vt))?,
            sigma_0: site.frozen("sigma_0", [rank], |_| Ok(sigma.clone()))?,
            sigma: site.trained("sigma", [rank], |_| Ok(sigma))?,
        })
    }
}

/// Smallest number of leading values that hold this fraction of the sum of squares.
fn rank_of(values: &[f64], energy: f64) -> usize {
    let total: f64 = values.iter().map(|value| value * value).sum();
    let mut held = 0.0;
    let reached = values.iter().position(|value| {
        held += value * value;
        held >= energy * total
    });
    reached.map_or(values.len(), |place| place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, largest, near};

    #[test]
    fn the_rank_is_the_smallest_that_holds_the_energy() {
        let values = [3.0, 2.0, 1.0, 0.0];
        assert_eq!([0.1, 9.0 / 14.0, 0.9, 0.95, 1.0].map(|energy| rank_of(&values, energy)), [1, 1, 2, 3, 3]);
        let bench = Bench::new(12, 9, true);
        let kept = bench.with(&AdapterConfig::new("svfit").with_option("energy", 0.8));
        let rank = kept.values("sigma").len();
        assert!(rank > 0 && rank < 9);
        // Built from its tensors alone, with any rank.
        let again = bench.with_tensors(&AdapterConfig::new("svfit").with_option("energy", 0.8), kept.tensors());
        assert_eq!(again.values("sigma"), kept.values("sigma"));
    }

    #[test]
    fn signs_of_directions_do_not_matter_and_the_update_stays_within_them() {
        let config = AdapterConfig::new("svfit").with_rank(4);
        let bench = Bench::new(10, 7, false);
        let mut tensors = bench.with(&config).tensors();
        Bench::change(&mut tensors, "sigma", |i, value| value * (0.5 + i as f32));
        let one = bench.with_tensors(&config, tensors.clone());
        let update = one.merged() - bench.weight();
        let [u, v] = [one.tensor::<2>("u"), one.tensor::<2>("vt").transpose()];
        let core = v.clone().transpose().matmul(update.clone()).matmul(u.clone());
        let off = core.clone() * (Tensor::eye(4, &core.device()) * -1.0 + 1.0);
        assert!(largest(off) < 1e-5 * largest(core));
        let outside = update.clone() - v.clone().matmul(v.transpose().matmul(update));
        assert!(largest(outside) < 1e-5);
        // Column i of u, row i of vt.
        Bench::change(&mut tensors, "u", |i, value| if i % 4 == 2 { -value } else { value });
        Bench::change(&mut tensors, "vt", |i, value| if i / 10 == 2 { -value } else { value });
        near(bench.with_tensors(&config, tensors).output(), one.output(), 1e-6);
    }
}
