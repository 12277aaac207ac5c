//! Initialisation `orthogonal`: factors whose product is zero.

use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;
use lowrank_optim::orthonormal_factor;

use super::start::{FactorInit, Start};
use crate::ground::initialisation::Initialisation;
use crate::ground::site::Site;

/// Registry entry.
pub(super) const ORTHOGONAL: FactorInit = FactorInit {
    about: Initialisation::plain(
        "orthogonal",
        "factors from the halves of an orthogonal matrix, whose product is zero",
        &[],
    ),
    check: |place| match place.rank.is_multiple_of(2) {
        true => Ok(()),
        false => Err(format!("the orthogonal start needs an even rank, not {}", place.rank)),
    },
    start: orthogonal,
};

/// `A = N1 Q_odd / 10`, `B = Q_even N2 / 10` with odd and even rows of an orthogonal `Q [rank, rank]`, so that `A B = 0`.
fn orthogonal(site: &Site<'_>) -> Start {
    let ([d_in, d_out], rank) = (site.place.shape, site.place.rank);
    let half = rank / 2;
    let device = site.plain_device();
    let tensor = |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &device);
    // [half, 2, rank]: first the even, then the odd row of each pair.
    let q = orthonormal_factor(&tensor(site.normal("q", rank * rank, 1.0), [rank, rank])).reshape([half, 2, rank]);
    let row = |place: usize| q.clone().slice([0..half, place..place + 1]).reshape([half, rank]);
    let a = tensor(site.normal("a", d_in * half, 1.0), [d_in, half]).matmul(row(1)).div_scalar(10.0);
    let b = row(0).transpose().matmul(tensor(site.normal("b", half * d_out, 1.0), [half, d_out])).div_scalar(10.0);
    Start { a: host(a), b: host(b) }
}
