//! Trained values at fixed positions of the weight ("Sparse High Rank Adapters", arXiv 2406.13175).

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use lowrank_kernels::host::values as host;
use lowrank_kernels::ops::sparse_matrix;
use lowrank_kernels::random::sample;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::torch::{LONGEST, permutation};
use crate::ground::base::Base;
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::pass::Input;
use crate::ground::site::{Place, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Method, Structure};
use crate::init::all_random::ALL_RANDOM;

/// `y = x (W + S) + b`, where `S` has as many values as a LoRA adapter of the same rank.
#[derive(Module, Debug)]
pub struct Shira {
    /// Values `[n]`, zero at the start.
    pub weight: Param<Tensor<1>>,
    /// Their positions in `[d_out, d_in]`: rows above columns, `[2, n]`, never changed.
    pub indices: Param<Tensor<2>>,
    #[module(skip)]
    shape: [usize; 2],
}

/// Options of [`Shira`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct ShiraOptions {
    /// Seed of the positions, as PyTorch draws them: layers of one shape share them.
    #[schemars(extend("x-unset" = "drawn for each layer from the seed of the adapter"))]
    pub random_seed: Option<u64>,
}

/// Number of trained values at a layer.
fn count(place: &Place) -> usize {
    place.rank * (place.shape[0] + place.shape[1])
}

impl Shira {
    fn update(&self) -> Tensor<2> {
        let [d_in, _] = self.shape;
        let indices: Tensor<2, Int> = self.indices.val().without_autodiff().int();
        let [_, n] = indices.dims();
        let rows = indices.clone().slice([0..1, 0..n]).mul_scalar(d_in as i64);
        let positions = rows + indices.slice([1..2, 0..n]);
        sparse_matrix(self.weight.val(), positions.reshape([n]), self.shape)
    }
}

impl Structure for Shira {
    fn forward(&self, base: &Base<'_>, input: Input) -> Tensor<2> {
        base.plus_update(input.x, self.update())
    }

    fn delta_weight(&self, _weight: &Tensor<2>) -> Option<Tensor<2>> {
        Some(self.update())
    }
}

impl Method for Shira {
    type Options = ShiraOptions;

    const SPEC: Spec = Spec {
        name: "shira",
        title: "Sparse High Rank Adapters",
        arxiv: "2406.13175",
        summary: "trains values at a few random positions of the weight",
        trains: "r (d_in + d_out)",
        stores: "2 r (d_in + d_out)",
        dense_forward: true,
        rank: Rank::Fixed(32),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[&ALL_RANDOM],
        dropout: false,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "weight", role: TensorRole::Block, transposed: false },
            TensorSpec { name: "indices", role: TensorRole::Frozen, transposed: false },
        ],
    };

    fn check(options: &ShiraOptions, place: &Place) -> Result<(), String> {
        let (most, asked) = (place.shape[0] * place.shape[1], count(place));
        if asked > most {
            return Err(format!("rank {} asks for {asked} positions, and the weight has {most}", place.rank));
        }
        if most > i32::MAX as usize {
            return Err("positions of 32 bits do not suffice for so large a weight".into());
        }
        match options.random_seed {
            Some(_) if most >= LONGEST => Err(format!(
                "random_seed: PyTorch draws the positions of weights from {LONGEST} elements in another way; leave it unset"
            )),
            _ => Ok(()),
        }
    }

    fn build(options: &ShiraOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let (shape @ [d_in, d_out], n) = (site.place.shape, count(site.place));
        let draw = |site: &mut Site<'_>| {
            let mut chosen: Vec<usize> = match options.random_seed {
                Some(seed) => permutation(seed, d_in * d_out, n),
                None => {
                    sample(&mut site.random("indices"), d_in * d_out, n).into_iter().map(|at| at as usize).collect()
                }
            };
            chosen.sort_unstable();
            let rows = chosen.iter().map(|at| (at / d_in) as f32);
            Ok(rows.chain(chosen.iter().map(|at| (at % d_in) as f32)).collect())
        };
        let random = site.place.init == ALL_RANDOM.name;
        let weight =
            site.trained("weight", [n], |site| Ok(if random { site.normal("weight", n, 1.0) } else { vec![0.0; n] }))?;
        let indices = site.frozen("indices", [2, n], draw)?;
        for (place, index) in host(indices.val()).into_iter().enumerate() {
            let side = if place < n { d_out } else { d_in };
            if index.fract() != 0.0 || !(0.0..side as f32).contains(&index) {
                let reason = format!("has the position {index}; it must be a whole number from 0 to {}", side - 1);
                return Err(AdapterError::Tensor { path: site.place.path.clone(), tensor: "indices".into(), reason });
            }
        }
        Ok(Self { weight, indices, shape })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use burn::tensor::TensorData;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::Bench;

    #[test]
    fn values_are_added_at_their_positions_and_nowhere_else() {
        let config = AdapterConfig::new("shira").with_rank(1);
        let (rows, columns): ([usize; 8], [usize; 8]) = ([0, 0, 1, 2, 3, 3, 3, 1], [2, 0, 3, 2, 1, 0, 3, 1]);
        let holding = |last: f32| {
            let indices = rows.iter().chain(&columns[..7]).map(|index| *index as f32).chain([last]);
            Bench::holding(
                &config,
                [4, 4],
                BTreeMap::from([
                    ("weight".to_string(), TensorData::new((1..9).map(|value| value as f32).collect(), [8])),
                    ("indices".to_string(), TensorData::new(indices.collect::<Vec<f32>>(), [2, 8])),
                ]),
            )
        };
        let update = host(holding(1.0).expect("positions of the weight").update());
        for (place, value) in update.into_iter().enumerate() {
            let (input, output) = (place / 4, place % 4);
            let own = (0..8).find(|at| (rows[*at], columns[*at]) == (output, input));
            assert_eq!(value, own.map_or(0.0, |at| (at + 1) as f32), "[{input}, {output}]");
        }
        assert!(holding(4.0).unwrap_err().contains("from 0 to 3") && holding(0.5).is_err());
    }

    #[test]
    fn a_seed_draws_the_positions_of_pytorch() {
        let indices = Bench::new(24, 30, false)
            .with(&AdapterConfig::new("shira").with_rank(1).with_option("random_seed", 11))
            .values("indices");
        let drawn: Vec<usize> = (0..54).map(|at| (indices[at] * 24.0 + indices[54 + at]) as usize).collect();
        assert!(drawn.is_sorted());
        assert!([441, 672, 676, 713, 49, 222, 575, 407].iter().all(|at| drawn.contains(at)));
    }
}
