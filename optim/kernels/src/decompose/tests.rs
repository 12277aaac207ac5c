//! Decompositions against their defining equations.

use super::*;
use burn::tensor::{Device, Int};

fn matrix(rows: usize, columns: usize) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * columns).map(|i| ((i * i) as f32 * 0.37).sin()).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &Device::default())
}

fn deviation_from_orthonormal(p: &Tensor<2>) -> f32 {
    let r = p.dims()[1];
    let gram = p.clone().transpose().matmul(p.clone());
    (gram - Tensor::eye(r, &p.device())).abs().max().into_scalar()
}

#[test]
fn directions_are_orthonormal_and_keep_the_most_energy() {
    for (rows, columns, right) in [(12, 8, true), (8, 12, true), (12, 8, false), (8, 12, false), (9, 9, true)] {
        let g = matrix(rows, columns);
        let p = leading_directions(&g, 4, right).unwrap();
        assert!(deviation_from_orthonormal(&p) < 1e-5);
        let kept = |p: &Tensor<2>| -> f32 {
            let low = if right { g.clone().matmul(p.clone()) } else { p.clone().transpose().matmul(g.clone()) };
            low.square().sum().into_scalar()
        };
        let best = kept(&p);
        for seed in 0..20 {
            let side = if right { columns } else { rows };
            let other = orthonormal_factor(&matrix(side, 4 + seed).narrow(1, seed, 4));
            assert!(kept(&other) <= best * 1.00001);
        }
        let values = values(p.clone());
        for column in 0..4 {
            let column: Vec<f32> = values.iter().skip(column).step_by(4).copied().collect();
            let top = column.iter().fold(0f32, |top, value| if value.abs() > top.abs() { *value } else { top });
            assert!(top > 0.0);
        }
    }
}

#[test]
fn directions_are_those_of_rotations() {
    let falling = |rows, columns| {
        let sizes: Vec<f32> = (0..columns).map(|i| (-0.3 * i as f32).exp()).collect();
        matrix(rows, columns)
            * Tensor::<1>::from_data(TensorData::new(sizes, [columns]), &Device::default()).unsqueeze()
    };
    for g in [matrix(90, 70), falling(60, 60), falling(100, 33)] {
        let gram = host(&g).transpose() * host(&g);
        let gram = &gram / gram.amax();
        let expected = by_rotations(gram.clone(), 16).unwrap();
        let ours = leading_eigenvectors(gram.as_slice().to_vec(), gram.nrows(), 16).unwrap();
        for (ours, expected) in ours.chunks_exact(gram.nrows()).zip(expected.column_iter()) {
            assert!((dot(ours, expected.as_slice()).abs() - 1.0).abs() < 1e-12);
        }
    }
}

#[test]
fn gram_matrices_are_products() {
    for (rows, columns) in [(5, 3), (40, 130), (130, 64)] {
        let g = host(&matrix(rows, columns));
        let expected = g.transpose() * &g;
        assert!((gram(&g) * expected.amax() - &expected).amax() < 1e-12 * expected.amax());
    }
}

#[test]
fn equal_eigenvalues_have_orthonormal_vectors() {
    let mut single = DMatrix::zeros(40, 40);
    single[(3, 3)] = 1.0;
    let low = DMatrix::from_fn(40, 3, |i, j| ((i * i + 7 * j) as f64 * 0.37).sin());
    let low = &low * low.transpose();
    for gram in [DMatrix::identity(40, 40), single, DMatrix::from_element(40, 40, 1.0), &low / low.amax()] {
        let vectors = leading_eigenvectors(gram.as_slice().to_vec(), 40, 40).map(|v| DMatrix::from_vec(40, 40, v));
        let vectors = vectors.unwrap_or_else(|| by_rotations(gram.clone(), 40).unwrap());
        assert!((vectors.transpose() * &vectors - DMatrix::identity(40, 40)).amax() < 1e-11);
        let turned = vectors.transpose() * &gram * &vectors;
        assert!((&turned - DMatrix::from_diagonal(&turned.diagonal())).amax() < 1e-10);
    }
}

#[test]
fn the_decomposition_gives_the_matrix_back() {
    for (rows, columns) in [(12, 8), (8, 12), (9, 9)] {
        let g = matrix(rows, columns);
        let svd = thin_svd(&g, rows.min(columns));
        assert!(svd.values.is_sorted_by(|a, b| a >= b));
        assert!(deviation_from_orthonormal(&svd.left) < 1e-5 && deviation_from_orthonormal(&svd.right) < 1e-5);
        let sizes: Vec<f32> = svd.values.iter().map(|value| *value as f32).collect();
        let sizes = Tensor::<1>::from_data(TensorData::new(sizes, [svd.values.len()]), &Device::default());
        let back = (svd.left * sizes.unsqueeze::<2>()).matmul(svd.right.transpose());
        assert!((back - g).abs().max().into_scalar::<f32>() < 1e-5);
    }
}

fn close(a: Tensor<2>, b: Tensor<2>) -> bool {
    (a - b).abs().max().into_scalar::<f32>() < 1e-5
}

#[test]
fn triangles_give_the_matrix_back_also_singular_ones() {
    let rows = |count: usize| matrix(1, 5).repeat_dim(0, count);
    let singular = [rows(4), Tensor::zeros([3, 5], &Device::default()), Tensor::cat(vec![rows(2) * 0.0, rows(1)], 0)];
    for g in [matrix(12, 8), matrix(8, 12), matrix(9, 9)].into_iter().chain(singular) {
        let lu = pivoted_lu(&g);
        let pivots: Vec<f32> = lu.diagonal.iter().map(|pivot| *pivot as f32).collect();
        let pivots = Tensor::<1>::from_data(TensorData::new(pivots, [lu.diagonal.len()]), &Device::default());
        let product = (lu.lower.clone() * pivots.unsqueeze::<2>()).matmul(lu.upper);
        let order: Vec<i32> = lu.permutation.iter().map(|row| *row as i32).collect();
        let order = Tensor::<1, Int>::from_data(TensorData::new(order, [g.dims()[0]]), &Device::default());
        assert!(close(product, g.select(0, order)));
        assert!(lu.lower.abs().max().into_scalar::<f32>() <= 1.0);
    }
}

#[test]
fn an_inverse_exists_where_its_digits_do() {
    let square = matrix(6, 6);
    let inverse = inverse(&square).unwrap();
    assert!(close(inverse.matmul(square), Tensor::eye(6, &Device::default())));
    assert!(super::inverse(&matrix(1, 6).repeat_dim(0, 6)).is_none());
    assert!(super::inverse(&(matrix(6, 6) * f32::NAN)).is_none());
}

#[test]
fn zero_dependent_and_infinite_columns_give_orthonormal_ones() {
    let zero = Tensor::<2>::zeros([6, 4], &Device::default());
    let same = matrix(6, 1).repeat_dim(1, 4);
    for y in [zero.clone(), same.clone(), zero.clone() + f32::NAN, same.clone() * 1e-30, same.clone() * 1e30] {
        assert!(deviation_from_orthonormal(&orthonormal_factor(&y)) < 1e-5);
        for directions in [leading_directions(&y, 3, true), leading_directions(&y, 5, false)] {
            match directions {
                Ok(directions) => assert!(deviation_from_orthonormal(&directions) < 1e-5),
                Err(DirectionsError::Zero) => assert!(values(y.clone()).iter().all(|element| *element == 0.0)),
                Err(error) => assert!(error == DirectionsError::NotFinite && values(y.clone())[0].is_nan()),
            }
        }
    }
}

#[test]
fn the_factor_spans_the_columns_with_a_positive_diagonal() {
    let y = matrix(10, 4);
    let q = orthonormal_factor(&y);
    let r = values(q.clone().transpose().matmul(y.clone()));
    for i in 0..4 {
        assert!(r[i * 4 + i] > 0.0);
        assert!((0..i).all(|j| r[i * 4 + j].abs() < 1e-5));
    }
    let back = q.clone().matmul(q.transpose().matmul(y.clone()));
    assert!((back - y).abs().max().into_scalar::<f32>() < 1e-5);
}
