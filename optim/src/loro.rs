//! Steps on the manifold of rank-r matrices: "Parameter and Memory Efficient Pretraining via Low-rank Riemannian Optimization" (Mo, Huang and
//! Pan, ICLR 2025).

use burn::tensor::{Device, Tensor, TensorData};
use nalgebra::DMatrix;

use crate::OptimError;
use crate::host::values;

/// Factors of a weight `W = M N^T`.
#[derive(Clone, Debug)]
pub struct Factors {
    /// `[rows, rank]`.
    pub m: Tensor<2>,
    /// `[columns, rank]`.
    pub n: Tensor<2>,
}

/// The cheap step between exact ones: each factor along its own direction, `step` times `scale`.
pub fn lazy_step(factors: Factors, directions: Factors, step: f64, scale: f64) -> Factors {
    Factors {
        m: factors.m - directions.m.mul_scalar(step * scale),
        n: factors.n - directions.n.mul_scalar(step * scale),
    }
}

/// The step along the manifold: the best approximation of rank r to `M N^T - step T`, where the tangent `T` is made of the directions of the
/// factors, with balanced factors. Works on matrices of twice the rank; the dense weight is never formed.
///
/// Factors whose columns depend on one another have no tangent and are refused.
pub fn exact_step(factors: &Factors, directions: &Factors, step: f64) -> Result<Factors, OptimError> {
    let device = factors.m.device();
    let [m, n, dm, dn] = [&factors.m, &factors.n, &directions.m, &directions.n].map(host);
    let rank = m.ncols();
    let (qr_m, qr_n) = (m.qr(), n.qr());
    let (u, rm, v, rn) = (qr_m.q(), qr_m.r(), qr_n.q(), qr_n.r());
    let singular = |r: &DMatrix<f64>| (0..rank).any(|i| r[(i, i)].abs() <= 1e-10 * r.amax());
    let inverse = |r: &DMatrix<f64>| r.clone().try_inverse().filter(|_| !singular(r));
    let (Some(rm_inverse), Some(rn_inverse)) = (inverse(&rm), inverse(&rn)) else {
        return Err(OptimError::Value {
            option: "rank",
            value: rank.to_string(),
            reason: "the columns of a factor depend on one another; begin it anew or lower the rank".into(),
        });
    };
    // They stand for G V and U^T G.
    let p = dm * rn_inverse;
    let q = rm_inverse.transpose() * dn.transpose();
    let k0 = &q * &v;
    let side = (&q - &k0 * v.transpose()).transpose().qr();
    let below = (&p - &u * (u.transpose() * &p)).qr();
    let (q1, k1, q2, k2) = (side.q(), side.r(), below.q(), below.r());
    let mut core = DMatrix::zeros(2 * rank, 2 * rank);
    core.view_mut((0, 0), (rank, rank)).copy_from(&(&rm * rn.transpose() - k0 * step));
    core.view_mut((0, rank), (rank, k1.nrows())).copy_from(&(k1.transpose() * -step));
    core.view_mut((rank, 0), (k2.nrows(), rank)).copy_from(&(k2 * -step));
    let svd = core.svd(true, true);
    let (Some(x), Some(y)) = (svd.u, svd.v_t) else {
        unreachable!("both sides of the decomposition were asked for");
    };
    let mut order: Vec<usize> = (0..2 * rank).collect();
    order.sort_by(|a, b| svd.singular_values[*b].total_cmp(&svd.singular_values[*a]).then(a.cmp(b)));
    let basis_m = join(&u, &q2);
    let basis_n = join(&v, &q1);
    let take = |basis: &DMatrix<f64>, core: &dyn Fn(usize, usize) -> f64| {
        let picked = DMatrix::from_fn(basis.ncols(), rank, |row, column| {
            core(row, order[column]) * svd.singular_values[order[column]].sqrt()
        });
        basis * picked
    };
    let (new_m, new_n) =
        (take(&basis_m, &|row, column| x[(row, column)]), take(&basis_n, &|row, column| y[(column, row)]));
    Ok(Factors { m: tensor(&new_m, &device), n: tensor(&new_n, &device) })
}

fn host(x: &Tensor<2>) -> DMatrix<f64> {
    let [rows, columns] = x.dims();
    DMatrix::from_row_slice(rows, columns, &values(x.clone())).map(f64::from)
}

fn tensor(x: &DMatrix<f64>, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = x.transpose().iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, [x.nrows(), x.ncols()]), device)
}

/// `[left right]`, filled up with zeros to twice the columns of the left.
fn join(left: &DMatrix<f64>, right: &DMatrix<f64>) -> DMatrix<f64> {
    let mut joined = DMatrix::zeros(left.nrows(), 2 * left.ncols());
    joined.view_mut((0, 0), left.shape()).copy_from(left);
    joined.view_mut((0, left.ncols()), right.shape()).copy_from(right);
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projector::normal_matrix;

    fn draw(rows: usize, rank: usize, key: u64) -> Tensor<2> {
        normal_matrix(3, key, [rows, rank], &Device::default())
    }

    #[test]
    fn the_result_is_balanced_and_does_not_depend_on_the_factors() {
        let (m, n, g) = (draw(9, 3, 0), draw(7, 3, 1), draw(9, 7, 2));
        let turn = draw(3, 3, 4) + Tensor::<2>::eye(3, &Device::default()) * 4.0;
        let stepped = |m: Tensor<2>, n: Tensor<2>| {
            let directions = Factors { m: g.clone().matmul(n.clone()), n: g.clone().transpose().matmul(m.clone()) };
            exact_step(&Factors { m, n }, &directions, 0.05).unwrap()
        };
        let one = stepped(m.clone(), n.clone());
        // W = M N^T = (M T) (N T^-T)^T
        let inverse = tensor(&host(&turn).try_inverse().unwrap().transpose(), &Device::default());
        let other = stepped(m.matmul(turn), n.matmul(inverse));
        let dense = |f: &Factors| f.m.clone().matmul(f.n.clone().transpose());
        assert!((dense(&one) - dense(&other)).abs().max().into_scalar::<f32>() < 1e-4);
        let gram = |x: &Tensor<2>| x.clone().transpose().matmul(x.clone());
        assert!((gram(&one.m) - gram(&one.n)).abs().max().into_scalar::<f32>() < 1e-4);
    }

    #[test]
    fn dependent_columns_are_refused() {
        let same = draw(9, 1, 0).repeat_dim(1, 3);
        let factors = Factors { m: same, n: draw(7, 3, 1) };
        let directions = Factors { m: draw(9, 3, 2), n: draw(7, 3, 3) };
        assert!(exact_step(&factors, &directions, 0.1).unwrap_err().to_string().contains("depend on one another"));
    }
}
