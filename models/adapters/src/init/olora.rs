//! Initialisation `olora` ("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv 2406.01775).

use lowrank_kernels::host::values as host;
use lowrank_optim::orthonormal_factor;
use lowrank_optim::registry::Paper;

use super::start::{FactorInit, Start};
use crate::ground::initialisation::Initialisation;
use crate::ground::site::Site;

/// Registry entry.
pub(super) const OLORA: FactorInit = FactorInit {
    about: Initialisation {
        starts_from_weight: true,
        ..Initialisation::plain(
            "olora",
            "factors of the QR decomposition of the weight",
            &[Paper { title: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", place: "2406.01775" }],
        )
    },
    check: |place| place.check_rank(),
    start: olora,
};

/// In `peft`'s orientation `B = Q[:, :r]`, `A = R[:r]` of `W = Q R` with `W [d_out, d_in]`.
fn olora(site: &Site<'_>) -> Start {
    let rank = site.place.rank;
    let [d_in, d_out] = site.place.shape;
    let transposed = site.weight().transpose();
    let q = orthonormal_factor(&transposed.clone().slice([0..d_out, 0..d_in.min(d_out)])).slice([0..d_out, 0..rank]);
    let r = q.clone().transpose().matmul(transposed);
    Start { a: host(r.transpose()), b: host(q.transpose()) }
}
