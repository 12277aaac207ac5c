//! Training with the fused operations and with their composed forms gives the same losses.

use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use lowrank_models::{Llama, LlamaConfig, ops};
use lowrank_optim::AdamWConfig;

fn losses(fused: bool) -> Vec<f32> {
    ops::set_fused(fused);
    let device = Device::default();
    let config = LlamaConfig {
        hidden_size: 48,
        intermediate_size: 80,
        head_dim: 12,
        ..LlamaConfig::named("llama-9m", 97).unwrap()
    };
    let mut model = Llama::random(&config, 7, &device.clone().autodiff()).unwrap();
    let mut optimizer = AdamWConfig::new().init();
    let tokens = |step: i32, ahead: i32| -> Tensor<2, Int> {
        let ids: Vec<i32> = (0..3 * 33).map(|i| (i + ahead + step % 5) * (i + ahead) % 97).collect();
        Tensor::<1, Int>::from_data(ids.as_slice(), &device).reshape([3, 33])
    };
    (0..50)
        .map(|step| {
            let loss = model.loss_sum(tokens(step, 0), tokens(step, 1), None).div_scalar(99.0);
            let value = loss.clone().inner().into_scalar::<f32>();
            let grads = GradientsParams::from_grads(loss.backward(), &model);
            model = optimizer.step(1e-3, model.clone(), grads);
            value
        })
        .collect()
}

#[test]
fn fused_and_composed_operations_train_alike() {
    let (composed, fused) = (losses(false), losses(true));
    assert!(fused[49] < fused[0] - 0.5, "the model learns: {fused:?}");
    for (step, (a, b)) in composed.iter().zip(&fused).enumerate() {
        assert!((a - b).abs() < 1e-4 * a.abs(), "step {step}: {a} composed, {b} fused");
    }
}
