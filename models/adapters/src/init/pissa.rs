//! Initialisation `pissa` ("PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
//! arXiv 2404.02948).

use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::registry::Paper;
use lowrank_optim::thin_svd;

use super::start::{FactorInit, Start};
use crate::ground::initialisation::Initialisation;
use crate::ground::site::Site;

/// Registry entry.
pub(super) const PISSA: FactorInit = FactorInit {
    about: Initialisation {
        starts_from_weight: true,
        ..Initialisation::plain(
            "pissa",
            "leading singular part of the weight",
            &[Paper {
                title: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
                place: "2404.02948",
            }],
        )
    },
    check: |place| place.check_rank(),
    start: pissa,
};

/// Leading singular part divided by the scale, with the singular values split between both factors.
fn pissa(site: &Site<'_>) -> Start {
    let svd = thin_svd(&site.weight(), site.place.rank);
    let device = site.plain_device();
    let scale = site.place.scale;
    let roots: Vec<f32> = svd.values.iter().map(|value| (value / scale).sqrt() as f32).collect();
    let roots = Tensor::<1>::from_data(TensorData::new(roots, [svd.values.len()]), &device).unsqueeze::<2>();
    Start { a: host(svd.left * roots.clone()), b: host((svd.right * roots).transpose()) }
}

#[cfg(test)]
mod tests {
    use lowrank_optim::AdamWConfig;

    use super::*;
    use crate::AdapterConfig;
    use crate::bench::{Bench, close, largest, near, wave};

    fn config(rank: usize, alpha: f64) -> AdapterConfig {
        AdapterConfig { init: "pissa".into(), ..AdapterConfig::new("lora") }.with_rank(rank).with_alpha(alpha)
    }

    fn product(shape: [usize; 2], rank: usize, alpha: f64) -> Tensor<2> {
        let bench = Bench::of(wave(shape, 1), None).with(&config(rank, alpha));
        bench.adapter().structure().delta_weight(&bench.weight()).unwrap().inner()
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
        // Equivalent to plain LoRA of twice the rank on the stored weight.
        let change = |bench: &Bench| {
            let [a, b] = bench.adapter().change().unwrap();
            assert_eq!(a.dims(), [9, 6]);
            a.matmul(b).inner()
        };
        near(bare.weight() + change(&bench), bench.merged(), 1e-6);
        assert!(largest(change(&fresh)) < 1e-6);
    }
}
