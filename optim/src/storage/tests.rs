use super::*;
use crate::methods::adamw::AdamWConfig;
use crate::methods::galore::GaLoreConfig;
use lowrank_kernels::host::values;
use lowrank_kernels::narrow::groups::quantise_groups;
use lowrank_kernels::narrow::packed::carrier;

const ALL: [WeightStorage; 6] = [
    WeightStorage::Bf16,
    WeightStorage::Bf16Nearest,
    WeightStorage::Bf16Kahan,
    WeightStorage::Bf16Plus8,
    WeightStorage::Bf16Plus16,
    WeightStorage::Int8,
];

fn wave(shape: [usize; 2], seed: f32) -> Vec<f32> {
    (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.731 + seed).sin() * 0.02).collect()
}

fn start(storage: WeightStorage, shape: [usize; 2]) -> Tensor<2> {
    let (device, x) = (Device::default(), wave(shape, 0.3));
    if storage == WeightStorage::Int8 {
        let codes = Codes::Groups(quantise_groups(&x, 8, 256, Rounding::Nearest), 256);
        return carrier(&PackedMatrix { shape, transposed: false, codes }, &device);
    }
    Tensor::from_data(TensorData::new(stored(&x, storage).0, shape), (&device, DType::BF16))
}

fn grad(shape: [usize; 2], step: usize) -> Tensor<2> {
    Tensor::from_data(TensorData::new(wave(shape, step as f32), shape), &Device::default())
}

/// Everything that is stored: bits of the weights, and the record.
fn bits<O: Optimizer>(w: &Tensor<2>, state: &Option<NarrowState<O::State<2>>>) -> (Vec<u8>, Vec<u8>) {
    let weights = match packed(w) {
        Some(matrix) => format!("{:?}", matrix.codes).into_bytes(),
        None => w.to_data().as_bytes().to_vec(),
    };
    let mut sink = StateSink::default();
    if let Some(state) = state {
        state.state_flatten("p", &mut sink);
    }
    (weights, sink.tensors.iter().flat_map(|(_, data)| data.as_bytes().to_vec()).collect())
}

fn resumed<O: Optimizer>(state: NarrowState<O::State<2>>) -> NarrowState<O::State<2>> {
    let mut sink = StateSink::default();
    state.state_flatten("p", &mut sink);
    let mut source = StateSource::new(sink.scalars.into_iter().collect());
    sink.tensors.into_iter().for_each(|(name, data)| source.insert_tensor(name, data));
    RecordState::state_unflatten("p", &mut source, &Device::default()).unwrap()
}

fn run<O: WeightChange>(optimizer: O, storage: WeightStorage, shape: [usize; 2]) {
    let optimizer = Narrow::new(optimizer, storage, 7, 11);
    let steps = |threads: usize, resumes: bool| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut w, mut state) = (start(storage, shape), None);
            for step in 0..6 {
                (w, state) = optimizer.step(1e-3, w, grad(shape, step), state);
                if resumes && step == 2 {
                    state = state.map(resumed::<O>);
                }
            }
            assert!(values(w.clone()).iter().all(|x| x.is_finite()), "{storage}");
            bits::<O>(&w, &state)
        })
    };
    let expected = steps(1, false);
    assert_ne!(expected.0, bits::<O>(&start(storage, shape), &None).0, "{storage} does not move");
    assert!(expected == steps(3, false) && expected == steps(2, true), "{storage}");
}

#[test]
fn steps_depend_neither_on_threads_nor_on_a_resume() {
    for storage in ALL {
        for shape in [[1, 1], [37, 11], [70, 300]] {
            run(AdamWConfig::new().with_weight_decay(0.1).build(), storage, shape);
        }
        run(GaLoreConfig::new(4).build(), storage, [20, 30]);
    }
}

#[test]
fn without_a_change_the_stored_bits_stay() {
    for storage in ALL {
        let shape = [40, 30];
        let optimizer = Narrow::new(AdamWConfig::new().build(), storage, 7, 11);
        let (w, state) = optimizer.step(1e-3, start(storage, shape), grad(shape, 1), None);
        let before = bits::<crate::AdamW>(&w, &None);
        let (w, _) = optimizer.step(0.0, w, grad(shape, 2), state);
        assert_eq!(bits::<crate::AdamW>(&w, &None), before, "{storage}");
    }
}

#[test]
fn one_step_is_that_in_f32_rounded_once() {
    let shape = [40, 30];
    for (storage, bound) in [
        (WeightStorage::Bf16, 2f32.powi(-7)),
        (WeightStorage::Bf16Nearest, 2f32.powi(-8)),
        (WeightStorage::Bf16Kahan, 2f32.powi(-8)),
        (WeightStorage::Bf16Plus8, 2f32.powi(-8)),
    ] {
        let plain = AdamWConfig::new().build();
        let before = start(storage, shape);
        let (wide, _) = plain.step(1e-3, before.clone().cast(DType::F32), grad(shape, 1), None);
        let (ours, state) = Narrow::new(plain, storage, 7, 11).step(1e-3, before, grad(shape, 1), None);
        assert_eq!(ours.dtype(), DType::BF16);
        for (ours, wide) in values(ours).iter().zip(values(wide)) {
            assert!((ours - wide).abs() <= bound * wide.abs() + 1e-12, "{storage}: {ours} {wide}");
        }
        let corrections = state.unwrap().corrections.map_or(0, |bytes| bytes.dims()[0]);
        assert_eq!(corrections, storage.correction_bytes(1200));
    }
}

#[test]
fn gradients_that_are_not_finite_show() {
    for storage in ALL {
        let optimizer = Narrow::new(AdamWConfig::new().build(), storage, 7, 11);
        let (w, _) = optimizer.step(1e-3, start(storage, [8, 40]), grad([8, 40], 1) * f32::NAN, None);
        assert!(values(w).iter().any(|x| x.is_nan()), "{storage}");
    }
}
