//! Properties of the transform and of the residual.

use std::collections::BTreeMap;

use super::*;
use crate::bench::{Bench, near, norm, random, rank};
use crate::{AdapterConfig, penalty};
use burn::module::ParamId;
use burn::optim::GradientsParams;
use burn::tensor::Device;
use lowrank_kernels::host::values as host;
use serde_json::json;

fn config(in_dims: &[usize], out_dims: &[usize], transform_rank: usize) -> AdapterConfig {
    let config = AdapterConfig::new("tlora").with_rank(2).with_option("transform_rank", transform_rank);
    config.with_option("in_dims", json!(in_dims)).with_option("out_dims", json!(out_dims))
}

fn tlora(bench: &Bench) -> TLora {
    bench.adapter().structure.downcast_ref::<TLora>().unwrap().clone()
}

/// Adapter of random tensors on a layer with these modes.
fn given(config: &AdapterConfig, in_dims: &[usize], out_dims: &[usize], ring: usize) -> Bench {
    let name = |list: &str, place: usize| format!("{list}.{place}");
    let mut tensors = Vec::new();
    for (place, mode) in in_dims.iter().copied().enumerate() {
        tensors.push((name("t", place), vec![mode, mode, ring, ring]));
        tensors.push((name("c", place), vec![mode, 2, 2]));
    }
    tensors.extend(out_dims.iter().enumerate().map(|(place, mode)| (name("b", place), vec![*mode, 2, 2])));
    let shape = [in_dims.iter().product(), out_dims.iter().product()];
    Bench::filled(config, shape, &tensors)
}

/// Transform computed from its definition.
fn by_definition(tlora: &TLora) -> Tensor<2> {
    let cores: Vec<Tensor<4>> = tlora.t.iter().map(|core| core.val().inner()).collect();
    let rank = cores[0].dims()[2];
    let side: usize = cores.iter().map(|core| core.dims()[0]).product();
    let digits = |mut number: usize| {
        let mut digits: Vec<usize> = Vec::new();
        for core in cores.iter().rev() {
            digits.insert(0, number % core.dims()[0]);
            number /= core.dims()[0];
        }
        digits
    };
    let entry = |row: usize, column: usize| {
        let slices = digits(row)
            .into_iter()
            .zip(digits(column))
            .zip(&cores)
            .map(|((i, k), core)| core.clone().slice([i..i + 1, k..k + 1]).reshape([rank, rank]));
        let product = slices.reduce(|product: Tensor<2>, slice| product.matmul(slice)).unwrap();
        (product * Tensor::eye(rank, &Device::default())).sum().into_scalar::<f32>()
    };
    let values: Vec<f32> = (0..side * side).map(|place| entry(place / side, place % side)).collect();
    Tensor::from_data(burn::tensor::TensorData::new(values, [side, side]), &Device::default())
}

#[test]
fn the_start_is_the_base_and_one_core_of_the_residual_moves() {
    for (in_dims, ring) in [(&[3usize, 4][..], 2), (&[2, 3, 2], 3), (&[12], 2), (&[3, 4], 1)] {
        for residual in ["tr", "lora"] {
            let config = config(in_dims, &[4, 5], ring).with_option("residual", residual);
            let bench = Bench::fresh(&config, [12, 20]).unwrap();
            near(tlora(&bench).transform().inner(), Tensor::eye(12, &Device::default()), 1e-6);
            let x = random([4, 12], 3);
            assert!(norm(bench.branch(x.clone())) <= 1e-6 * norm(bench.base(x)));
            let (moved, still): (Vec<_>, Vec<_>) = bench.learning().into_iter().partition(|(_, moved)| *moved);
            let names = |tensors: Vec<(String, bool)>| {
                let names = tensors.into_iter().map(|(name, _)| name).filter(|name| !name.starts_with("t."));
                names.collect::<Vec<_>>()
            };
            assert_eq!(moved.iter().filter(|(name, _)| name.starts_with("t.")).count(), in_dims.len());
            assert_eq!(names(moved), [if residual == "tr" { "b.0" } else { "lora_b" }]);
            assert!(names(still).iter().all(|name| name == "lora_a" || name == "b.1" || name.starts_with("c.")));
        }
    }
}

#[test]
fn acting_core_by_core_equals_the_matrices() {
    for (in_dims, ring) in [(&[3usize, 4][..], 2), (&[2, 3, 2], 2), (&[2, 2, 2, 2], 2), (&[6], 3), (&[3, 4], 1)] {
        let bench = given(&config(in_dims, &[2, 5], ring), in_dims, &[2, 5], ring);
        let expected = by_definition(&tlora(&bench));
        near(tlora(&bench).transform().inner(), expected.clone(), 1e-5);
        assert_eq!(rank(&expected), expected.dims()[0]);
        let d_in = expected.dims()[0];
        let x = random([7, d_in], 3);
        near(bench.branch(x.clone()), x.matmul(bench.update()), 1e-4);
        let trained: usize = bench.adapter().shapes().iter().map(|t| t.shape.iter().product::<usize>()).sum();
        let squares: usize = in_dims.iter().map(|mode| mode * mode).sum();
        assert_eq!(trained, ring * ring * squares + 4 * (2 + 5 + in_dims.iter().sum::<usize>()));
    }
}

#[test]
fn a_ring_of_rank_one_is_a_kronecker_product() {
    let bench = given(&config(&[2, 3], &[4], 1), &[2, 3], &[4], 1);
    let [first, second] = [bench.tensor::<4>("t.0").reshape([2, 2]), bench.tensor::<4>("t.1").reshape([3, 3])];
    let product = first.reshape([2, 1, 2, 1]) * second.reshape([1, 3, 1, 3]);
    near(tlora(&bench).transform().inner(), product.reshape([6, 6]), 1e-6);
}

#[test]
fn diagonal_cores_scale_the_inputs() {
    let bench = given(&config(&[2, 3], &[4], 2), &[2, 3], &[4], 2);
    let mut tlora = tlora(&bench);
    let device = Device::default();
    tlora.t = tlora
        .t
        .into_iter()
        .map(|core| {
            core.map(|core| {
                let mode = core.dims()[0];
                core * Tensor::<2>::eye(mode, &device).reshape([mode, mode, 1, 1])
            })
        })
        .collect();
    let transform = tlora.transform().inner();
    let off = transform.clone() * (Tensor::<2>::eye(6, &device).neg().add_scalar(1.0));
    assert!(norm(off) == 0.0 && norm(transform) > 0.1);
}

#[test]
fn the_cores_of_the_gram_matrix_follow_the_product_rule() {
    let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
    let tlora = tlora(&bench);
    let cores: Vec<Param<Tensor<4>>> = tlora
        .t
        .iter()
        .map(|core| {
            let core = core.val().inner();
            let mode = core.dims()[0];
            // [i, k, rho rho', sigma sigma'], summed over the inner index.
            let rows = core.permute([0, 2, 3, 1]).reshape([mode * 4, mode]);
            let gram = rows.clone().matmul(rows.transpose()).reshape([mode, 2, 2, mode, 2, 2]);
            let gram = gram.permute([0, 3, 1, 4, 2, 5]).reshape([mode, mode, 4, 4]);
            Param::initialized(ParamId::new(), gram)
        })
        .collect();
    let gram = transformed(Tensor::eye(12, &Device::default()), &cores).transpose();
    let transform = tlora.transform().inner();
    near(gram, transform.clone().matmul(transform.transpose()), 1e-5);
}

#[test]
fn penalties_and_their_slopes_are_zero_at_the_start() {
    for (which, ring, squared) in
        [("identity", 3, false), ("orthogonal", 3, false), ("orthogonal", 2, true), ("identity", 2, true)]
    {
        let config = config(&[3, 4], &[4, 5], ring).with_option("regulariser", which);
        let bench = Bench::fresh(&config.with_option("reg_squared", squared), [12, 20]).unwrap();
        let value = penalty(&bench, PenaltyAt::Loss).unwrap();
        assert_eq!(value.clone().into_scalar::<f32>(), 0.0, "{which} {ring}");
        let mut grads = GradientsParams::from_grads(value.backward(), &bench);
        for core in bench.adapter().shapes().iter().filter(|tensor| tensor.field.starts_with("t.")) {
            assert!(
                host(grads.remove::<4>(core.id).unwrap()).iter().all(|gradient| *gradient == 0.0),
                "{which} {ring}"
            );
        }
    }
    // Permutations are orthogonal but not the identity.
    let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
    let mut tlora = tlora(&bench);
    tlora.t = tlora
        .t
        .into_iter()
        .map(|core| {
            core.map(|core| {
                let mode = core.dims()[0];
                let transposed = Tensor::<2>::eye(mode, &Device::default()).roll_dim(1, 0).div_scalar(2.0);
                core * 0.0 + transposed.reshape([mode, mode, 1, 1])
            })
        })
        .collect();
    assert!(tlora.distance(Regulariser::Orthogonal).into_scalar::<f32>() < 1e-6);
    assert!(tlora.distance(Regulariser::Identity).into_scalar::<f32>() > 1.0);
}

#[test]
fn squared_norms_add_up_without_roots() {
    let bench = given(&config(&[3, 4], &[4], 2), &[3, 4], &[4], 2);
    let mut tlora = tlora(&bench);
    let expected: f64 = tlora
        .t
        .iter()
        .map(|core| {
            let core = core.val().inner();
            let mode = core.dims()[0];
            let identity = Tensor::<2>::eye(mode, &Device::default()).div_scalar(2.0);
            norm(core - identity.reshape([mode, mode, 1, 1])).powi(2)
        })
        .sum();
    tlora.reg_squared = true;
    let ours = f64::from(tlora.distance(Regulariser::Identity).into_scalar::<f32>());
    assert!((ours / expected - 1.0).abs() < 1e-5);
}

#[test]
fn the_usual_rank_is_that_of_the_residual() {
    let ranks = |config: AdapterConfig| -> BTreeMap<String, Vec<usize>> {
        let bench = Bench::fresh(&config, [12, 20]).unwrap();
        bench.adapter().shapes().into_iter().map(|tensor| (tensor.field, tensor.shape)).collect()
    };
    assert_eq!(ranks(AdapterConfig::new("tlora"))["b.0"], [4, 6, 6]);
    assert_eq!(ranks(AdapterConfig::new("tlora").with_option("residual", "lora"))["lora_a"], [12, 4]);
}
