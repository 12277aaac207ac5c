//! Frozen rows of a shared orthogonal basis ("Orthogonal Adaptation for Modular Customization of Diffusion Models", arXiv 2312.02432): adapters that
//! are trained apart and added without disturbing each other.

mod basis;
mod registry;

use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use lowrank_kernels::host::values as host;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::registry::{Claim, claim};
use crate::ground::config::Scaling;
use crate::ground::error::AdapterError;
use crate::ground::fingerprint::of_values;
use crate::ground::site::{Place, Shared, SharedBytes, Site};
use crate::ground::spec::{Alpha, Rank, Spec, TensorRole, TensorSpec};
use crate::ground::structure::{Factors, Method, Structure};

pub use basis::{Basis, BasisKind};

/// `y = x W + b + (x A) B`: the columns of A are vectors of a basis that all adapters of the same seed share, and only B is trained, from zero.
///
/// Updates of adapters with different vectors do not meet: `D_i D_j^T = 0`.
#[derive(Module, Debug)]
pub struct Orthogonal {
    /// Factor at the output `[rank, d_out]`, zero at the start.
    pub b: Param<Tensor<2>>,
    /// Numbers of the vectors `[rank]`; none for independent rows.
    pub indices: Option<Param<Tensor<1>>>,
    /// Vectors `[d_in, rank]`, which follow from their numbers.
    #[module(skip)]
    a: Shared<2>,
    #[module(skip)]
    basis: (BasisKind, u64),
}

/// Options of [`Orthogonal`].
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct OrthogonalOptions {
    /// Construction of the basis.
    pub basis: BasisKind,
    /// Seed of the basis, the same for all adapters that are to be added.
    pub basis_seed: u64,
    /// File of the vectors in use, which hands out unused ones; needs `concept`.
    #[schemars(extend("x-unset" = "vectors are drawn from the seed alone"))]
    pub registry: Option<String>,
    /// Name of this adapter in the registry.
    #[schemars(extend("x-unset" = "none"))]
    pub concept: Option<String>,
    /// Takes vectors that are in use when too few are left.
    pub allow_overlap: bool,
}

impl Structure for Orthogonal {
    fn factors(&self) -> Option<Factors> {
        let (a, b) = (self.a.val(), self.b.val());
        let a = if b.device().is_autodiff() { Tensor::from_inner(a) } else { a };
        Some(Factors { a, b, scale: 1.0 })
    }

    fn shared(&self) -> Vec<SharedBytes> {
        vec![self.a.bytes()]
    }

    fn basis(&self) -> Option<String> {
        let (kind, seed) = self.basis;
        Some(kind.named(seed))
    }
}

impl Method for Orthogonal {
    type Options = OrthogonalOptions;

    const SPEC: Spec = Spec {
        name: "orthogonal",
        title: "Orthogonal Adaptation for Modular Customization of Diffusion Models",
        arxiv: "2312.02432",
        summary: "frozen rows of a basis that all adapters share, for sums without cross-talk",
        trains: "r d_out",
        stores: "r",
        dense_forward: false,
        rank: Rank::Fixed(20),
        alpha: Alpha::None,
        scaling: Scaling::Rank,
        inits: &[],
        dropout: true,
        merges: Ok(()),
        changes_bias: false,
        tensors: &[
            TensorSpec { name: "b", role: TensorRole::B, transposed: true },
            TensorSpec { name: "indices", role: TensorRole::Frozen, transposed: false },
            TensorSpec { name: "a", role: TensorRole::Frozen, transposed: true },
        ],
    };

    fn check(options: &OrthogonalOptions, place: &Place) -> Result<(), String> {
        match (&options.registry, &options.concept) {
            (Some(registry), None) => {
                return Err(format!("registry = {registry} needs the name of this adapter there: set concept"));
            }
            (None, Some(concept)) => return Err(format!("concept = {concept} needs a file: set registry")),
            (Some(registry), _) if options.basis == BasisKind::Gaussian => {
                return Err(format!("registry = {registry}: a gaussian basis has no shared vectors; remove it"));
            }
            _ => {}
        }
        match place.rank {
            0 => Err("rank must be at least 1".into()),
            rank if rank > place.shape[0] => {
                Err(format!("rank {rank} is larger than the number of inputs, {}", place.shape[0]))
            }
            _ => Ok(()),
        }
    }

    fn build(options: &OrthogonalOptions, site: &mut Site<'_>) -> Result<Self, AdapterError> {
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let (kind, path) = (options.basis.of(d_in), site.place.path.clone());
        let basis = (kind, options.basis_seed);
        let b = site.trained("b", [rank, d_out], |_| Ok(vec![0.0; rank * d_out]))?;
        if kind == BasisKind::Gaussian {
            let deviation = (d_in as f64).sqrt().recip();
            let draws = site.normal("a", d_in * rank, deviation);
            let key = format!("orthogonal.{path}.{:016x}", of_values("a", &draws));
            let a = site.shared("a", &key, [d_in, rank], |_| Ok(draws))?;
            return Ok(Self { b, indices: None, a, basis });
        }
        let indices = site.frozen("indices", [rank], |site| drawn(options, site, kind))?;
        let numbers = numbers(&host(indices.val().without_autodiff()), d_in, &path)?;
        let key = format!("orthogonal.{path}.{}.{numbers:?}", options.basis_seed);
        let basis_seed = options.basis_seed;
        let a = site.shared("a", &key, [d_in, rank], |_| {
            let basis = Basis::seeded(kind, basis_seed, d_in);
            let rows: Vec<Vec<f32>> = numbers.iter().map(|number| basis.row(*number)).collect();
            Ok((0..d_in).flat_map(|input| rows.iter().map(move |row| row[input])).collect())
        })?;
        Ok(Self { b, indices: Some(indices), a, basis })
    }
}

/// Draws the numbers of the vectors of a layer.
fn drawn(options: &OrthogonalOptions, site: &Site<'_>, kind: BasisKind) -> Result<Vec<f32>, AdapterError> {
    let ([d_in, _], rank) = (site.place.shape, site.place.rank);
    let draw = |free: &[usize]| -> Vec<usize> {
        let mut random = site.random("indices");
        let places = lowrank_kernels::random::sample(&mut random, free.len(), rank);
        places.into_iter().map(|place| free[place as usize]).collect()
    };
    let numbers = match (&options.registry, &options.concept) {
        (Some(registry), Some(concept)) => {
            let asked = Claim {
                layer: &site.place.path,
                concept,
                d_in,
                basis: kind,
                basis_seed: options.basis_seed,
                rank,
                allow_overlap: options.allow_overlap,
            };
            claim(Path::new(registry), &asked, draw).map_err(AdapterError::Refused)?
        }
        _ => draw(&(0..d_in).collect::<Vec<_>>()),
    };
    Ok(numbers.into_iter().map(|number| number as f32).collect())
}

/// Numbers of vectors from a file; rejects fractions, numbers outside the basis and repeated ones.
fn numbers(values: &[f32], d_in: usize, path: &str) -> Result<Vec<usize>, AdapterError> {
    let mut numbers = Vec::with_capacity(values.len());
    for value in values {
        let number = *value as usize;
        if value.fract() != 0.0 || *value < 0.0 || number >= d_in || numbers.contains(&number) {
            return Err(AdapterError::Tensor {
                path: path.to_string(),
                tensor: "indices".into(),
                reason: format!("has {value}; it holds different whole numbers below {d_in}"),
            });
        }
        numbers.push(number);
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, near};
    use lowrank_optim::AdamWConfig;

    fn config(basis: &str, seed: u64) -> AdapterConfig {
        let config = AdapterConfig { seed, ..AdapterConfig::new("orthogonal").with_rank(4) };
        config.with_option("basis", basis)
    }

    fn indices(bench: &Bench) -> Vec<f32> {
        bench.values("indices")
    }

    #[test]
    fn the_start_is_the_base_and_only_b_is_trained() {
        for basis in ["qr", "dct", "gaussian"] {
            let bare = Bench::new(12, 7, true);
            let bench = bare.with(&config(basis, 1));
            near(bench.output(), bare.output(), 0.0);
            let learning = bench.learning();
            assert_eq!(learning, std::collections::BTreeMap::from([("b".to_string(), true)]));
            let (moved, _) = bench.clone().steps(AdamWConfig::new().init(), 1e-1, 6);
            assert!(moved.values("b").iter().all(|value| *value != 0.0));
            let Some(factors) = moved.adapter().structure().factors() else { unreachable!() };
            if basis != "gaussian" {
                let gram = factors.a.clone().transpose().matmul(factors.a).inner();
                near(gram, Tensor::eye(4, &Default::default()), 1e-6);
                assert_eq!(indices(&moved), indices(&bench));
            }
        }
    }

    #[test]
    fn a_registry_hands_out_unused_vectors_and_gives_a_concept_its_own_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("used.json");
        let of = |concept: &str, seed: u64| {
            let config = config("dct", seed).with_option("registry", file.to_str().unwrap());
            config.with_option("concept", concept)
        };
        let bare = Bench::new(12, 7, false);
        let all: Vec<Vec<f32>> = ["a", "b", "c"].map(|concept| indices(&bare.with(&of(concept, 1)))).to_vec();
        let mut together = all.concat();
        together.sort_by(f32::total_cmp);
        assert_eq!(together, (0..12).map(|number| number as f32).collect::<Vec<_>>());
        // Asked again, with another seed too.
        assert_eq!(indices(&bare.with(&of("b", 2))), all[1]);
        let error = Bench::fresh(&of("d", 1), [12, 7]).map(|_| ()).unwrap_err();
        assert!(error.contains("0 of 12 vectors are left") && error.contains("allow_overlap"), "{error}");
        assert_eq!(indices(&bare.with(&of("d", 1).with_option("allow_overlap", true))).len(), 4);
        let error = Bench::fresh(&of("a", 1).with_option("basis_seed", 3), [12, 7]).map(|_| ()).unwrap_err();
        assert!(error.contains("basis_seed = 3") && error.contains("set it to 0"), "{error}");
        let error = Bench::fresh(&of("a", 1).with_rank(2), [12, 7]).map(|_| ()).unwrap_err();
        assert!(error.contains("has rank 4") && error.contains("another name"), "{error}");
    }
}
