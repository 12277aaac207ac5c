//! How the two factors of LoRA and its relatives begin.
//!
//! - `default`: A uniform between plus and minus `1 / sqrt(d_in)`, B zero.
//! - `gaussian`: A normal of deviation `1 / rank`, B zero, as `peft` names it.
//! - `random`: A as in `default`, B uniform between plus and minus `1 / sqrt(rank)`: does not start at the base, for experiments alone.
//! - `orthogonal`: factors from the halves of an orthogonal matrix, whose product is zero.
//! - `olora`: the QR factors of the weight ("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775).
//! - `pissa`: its leading singular part ("PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", arXiv
//!   2404.02948).
//!
//! Where the factors begin as part of the weight, that product is taken from the base while the adapter runs ([`Attached::origin`]): the weight is
//! never changed, and the layer starts as it was.
//!
//! [`Attached::origin`]: super::Attached::origin

use burn::module::LoraAdapter;
use burn::tensor::{Tensor, TensorData};
use lowrank_optim::{orthonormal_factor, thin_svd};

use super::error::AdapterError;
use super::site::{Place, Site};
use super::structure::Structure;
use crate::weights::host;

/// Starts that a structure of two factors knows besides the default.
pub(super) const OF_FACTORS: &[&str] = &["gaussian", "random", "orthogonal", "olora", "pissa"];

/// Whether the factors begin as part of the weight.
pub(super) fn is_part_of_the_weight(init: &str) -> bool {
    matches!(init, "pissa" | "olora")
}

/// Whether the start asks for gradients of the base weights, which [`collect_gradients`](super::collect_gradients) sums.
pub fn asks_for_gradients(init: &str) -> bool {
    init == "lora-sb"
}

/// Whether the layer begins as something else than the base.
pub fn leaves_the_base(init: &str) -> bool {
    matches!(init, "random" | "lora-sb" | "small_random")
}

pub(super) fn check(place: &Place) -> Result<(), String> {
    match place.init.as_str() {
        "pissa" | "olora" => place.check_rank(),
        "orthogonal" if !place.rank.is_multiple_of(2) => {
            Err(format!("the orthogonal start needs an even rank, not {}", place.rank))
        }
        _ => Ok(()),
    }
}

/// Row-major factors `A [d_in, rank]` and `B [rank, d_out]`.
#[derive(Clone, Debug, Default)]
pub(super) struct Factors {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

impl Factors {
    /// What the factors of this layer begin with; nothing where a file has them.
    pub fn of(site: &Site<'_>) -> Result<Self, AdapterError> {
        if site.is_given() {
            return Ok(Self::default());
        }
        let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
        let bound = (d_in as f64).sqrt().recip();
        let zero = vec![0.0; rank * d_out];
        Ok(match site.place.init.as_str() {
            "gaussian" => Self { a: site.normal("a", d_in * rank, (rank as f64).recip()), b: zero },
            "random" => Self {
                a: site.uniform("a", d_in * rank, bound),
                b: site.uniform("b", rank * d_out, (rank as f64).sqrt().recip()),
            },
            "orthogonal" => orthogonal(site),
            "olora" => olora(site),
            "pissa" => pissa(site),
            _ => Self { a: site.uniform("a", d_in * rank, bound), b: zero },
        })
    }
}

/// `A = N1 Q_odd / 10`, `B = Q_even N2 / 10` with odd and even rows of an orthogonal `Q [rank, rank]`, so that `A B = 0`.
fn orthogonal(site: &Site<'_>) -> Factors {
    let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
    let half = rank / 2;
    let device = site.plain_device();
    let tensor = |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &device);
    // [half, 2, rank]: first the even, then the odd row of each pair.
    let q = orthonormal_factor(&tensor(site.normal("q", rank * rank, 1.0), [rank, rank])).reshape([half, 2, rank]);
    let row = |place: usize| q.clone().slice([0..half, place..place + 1]).reshape([half, rank]);
    let a = tensor(site.normal("a", d_in * half, 1.0), [d_in, half]).matmul(row(1)).div_scalar(10.0);
    let b = row(0).transpose().matmul(tensor(site.normal("b", half * d_out, 1.0), [half, d_out])).div_scalar(10.0);
    Factors { a: host(a), b: host(b) }
}

/// In `peft`'s orientation `B = Q[:, :r]`, `A = R[:r]` of `W = Q R` with `W [d_out, d_in]`.
fn olora(site: &Site<'_>) -> Factors {
    let rank = site.place.rank;
    let [d_in, d_out] = site.place.shape;
    let turned = site.weight().transpose();
    let q = orthonormal_factor(&turned.clone().slice([0..d_out, 0..d_in.min(d_out)])).slice([0..d_out, 0..rank]);
    let r = q.clone().transpose().matmul(turned);
    Factors { a: host(r.transpose()), b: host(q.transpose()) }
}

/// The leading singular part over the scale, its values shared by both factors.
fn pissa(site: &Site<'_>) -> Factors {
    let svd = thin_svd(&site.weight(), site.place.rank);
    let device = site.plain_device();
    let scale = site.place.scale;
    let roots: Vec<f32> = svd.values.iter().map(|value| (value / scale).sqrt() as f32).collect();
    let roots = Tensor::<1>::from_data(TensorData::new(roots, [svd.values.len()]), &device).unsqueeze::<2>();
    Factors { a: host(svd.left * roots.clone()), b: host((svd.right * roots).transpose()) }
}

/// The product that the factors begin with, where they begin as part of the weight.
pub(super) fn origin(site: &mut Site<'_>, structure: &dyn Structure) -> Result<Option<LoraAdapter>, AdapterError> {
    if !is_part_of_the_weight(&site.place.init) && !structure.begins_in_weight() {
        return Ok(None);
    }
    let Some([a, b]) = structure.product() else {
        return Err(AdapterError::Refused(format!(
            "{} has no factors that begin as part of the weight",
            site.spec.name
        )));
    };
    let ([d_in, d_out], rank, scale) = (site.place.shape, site.place.rank, site.place.scale);
    Ok(Some(LoraAdapter {
        a: site.frozen("origin.a", [d_in, rank], |_| Ok(host(a)))?,
        b: site.frozen("origin.b", [rank, d_out], |_| Ok(host(b.div_scalar(scale))))?,
        scale,
    }))
}

#[cfg(test)]
mod tests {
    use lowrank_optim::AdamWConfig;

    use super::super::bench::{Bench, close, largest, near, wave};
    use super::*;
    use crate::adapter::AdapterConfig;

    fn config(rank: usize, alpha: f64) -> AdapterConfig {
        AdapterConfig { init: "pissa".into(), ..AdapterConfig::new("lora") }.with_rank(rank).with_alpha(alpha)
    }

    fn product(shape: [usize; 2], rank: usize, alpha: f64) -> Tensor<2> {
        let bench = Bench::of(wave(shape, 1), None).with(&config(rank, alpha));
        bench.adapter().structure().update(&bench.weight()).inner()
    }

    #[test]
    fn what_pissa_leaves_is_the_rest_of_the_singular_values() {
        for shape in [[12, 7], [7, 12], [8, 8]] {
            let values = thin_svd(&wave(shape, 1).inner(), 7).values;
            let rest = wave(shape, 1).inner() - product(shape, 3, 3.0);
            assert!((thin_svd(&rest, 1).values[0] / values[3] - 1.0).abs() < 1e-4);
            // Alpha changes the factors, not their product.
            near(product(shape, 3, 11.0), product(shape, 3, 3.0), 1e-5);
            near(product(shape, shape[0].min(shape[1]), 5.0), wave(shape, 1), 1e-5);
        }
    }

    #[test]
    fn signs_of_the_directions_do_not_count() {
        let bare = Bench::of(wave([9, 6], 1), None);
        let fresh = bare.with(&config(3, 3.0));
        let trained = |sign: [f32; 3]| {
            let mut tensors = fresh.tensors();
            for field in ["a", "origin.a"] {
                Bench::change(&mut tensors, field, |place, value| value * sign[place / 9]);
            }
            for field in ["b", "origin.b"] {
                Bench::change(&mut tensors, field, |place, value| value * sign[place % 3]);
            }
            bare.with_tensors(&config(3, 3.0), tensors).steps(AdamWConfig::new().init(), 1e-2, 4)
        };
        let ((bench, one), (_, two)) = (trained([1.0; 3]), trained([1.0, -1.0, -1.0]));
        assert!(one.into_iter().zip(two).all(|(one, two)| close(one, two, 1e-5)));
        // As plain LoRA on the stored weight, of twice the rank.
        let change = |bench: &Bench| {
            let [a, b] = bench.adapter().change().unwrap();
            assert_eq!(a.dims(), [9, 6]);
            a.matmul(b).inner()
        };
        near(bare.weight() + change(&bench), bench.merged(), 1e-6);
        assert!(largest(change(&fresh)) < 1e-6);
    }
}
