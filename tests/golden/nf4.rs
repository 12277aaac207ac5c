//! NF4 and FP4 against reference values.

use std::path::Path;

use burn::tensor::{Device, Tensor, bf16};
use lowrank_models::hub::{self, ModelFolder};
use lowrank_models::{BaseStorage, Linear, Llama, MatrixStorage, ModelError, ids_tensor, ops};
use lowrank_optim::narrow::four_bit::{FP4, FourBit, NESTED_BLOCK, NF4, Scales, nf4_limits};
use lowrank_optim::narrow::packed::{Codes, PackedMatrix, carrier, packed};
use safetensors::SafeTensors;

use super::support::case::{Array, Case, Outcome, host};

pub fn run(case: &Case) -> Outcome {
    if case.path.parent().is_some_and(|folder| folder.join("model/config.json").exists()) {
        return folder(case);
    }
    for (name, ours) in [("bounds", &nf4_limits()[..]), ("map", map(case)?)] {
        if case.has(name) {
            case.array(name)?.near(name, ours, 0.0, 0.0)?;
        }
    }
    if case.has("grad_output") {
        return products(case);
    }
    if case.has("w") || case.has("x") {
        return quantised(case);
    }
    let expected = case.array("restored")?;
    let stored = given(case, expected.values.len())?;
    expected.near("restored", &stored.restored(), 0.0, 0.0)?;
    rounded(case, &stored)?;
    Ok("all values are equal".into())
}

/// Values of the codes, by the type of the case.
fn map(case: &Case) -> Result<&'static [f32; 16], String> {
    match case.config["quant_type"].as_str() {
        Some("nf4") | None => Ok(&NF4),
        Some("fp4") => Ok(&FP4),
        Some(other) => Err(format!("configuration: quant_type is \"{other}\"")),
    }
}

fn bytes(array: &Array) -> Vec<u8> {
    array.values.iter().map(|value| *value as u8).collect()
}

/// The codes of a case with its scales.
fn given(case: &Case, count: usize) -> Result<FourBit, String> {
    let scales = match case.has("absmax_codes") {
        false => Scales::Plain(case.array("absmax")?.f32()),
        true => Scales::Double {
            codes: bytes(&case.array("absmax_codes")?),
            nested: case.array("nested_absmax")?.f32(),
            map: Box::new(case.array("nested_map")?.f32().try_into().map_err(|_| "nested_map has not 256 values")?),
            offset: case.array("nested_offset")?.f32()[0],
        },
    };
    Ok(FourBit { packed: bytes(&case.array("packed")?), map: *map(case)?, block: case.count("block")?, count, scales })
}

fn same(what: &str, ours: &[u8], expected: &Array) -> Result<(), String> {
    let expected = bytes(expected);
    if ours.len() != expected.len() {
        return Err(format!("{what}: {} bytes instead of {}", ours.len(), expected.len()));
    }
    match ours.iter().zip(&expected).position(|(ours, expected)| ours != expected) {
        None => Ok(()),
        Some(place) => Err(format!("{what}[{place}] is {} instead of {}", ours[place], expected[place])),
    }
}

fn quantised(case: &Case) -> Outcome {
    let name = if case.has("w") { "w" } else { "x" };
    let (w, block) = (case.array(name)?, case.count("block")?);
    if map(case)? != &NF4 {
        return Err("fp4 is read, nothing is quantised to it".into());
    }
    let ours = FourBit::nf4(&w.f32(), block);
    same("packed", &ours.packed, &case.array("packed")?)?;
    if case.has("codes") {
        let codes: Vec<u8> = ours.packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).take(w.values.len()).collect();
        same("codes", &codes, &case.array("codes")?)?;
    }
    let Scales::Plain(scales) = &ours.scales else { return Err("scales are plain at first".into()) };
    case.array("absmax")?.near("absmax", scales, 0.0, 0.0)?;
    let double = case.config["double_quant"].as_bool().unwrap_or(false);
    if case.config["bytes"].is_u64() {
        let bytes = FourBit::bytes(w.values.len(), block, double);
        if bytes != case.count("bytes")? {
            return Err(format!("{bytes} bytes instead of {}", case.config["bytes"]));
        }
    }
    if !double {
        case.array("restored")?.near("restored", &ours.restored(), 0.0, 0.0)?;
        rounded(case, &ours)?;
        return Ok("codes, scales and restored values are equal".into());
    }
    if case.config["nested_block"].as_u64().is_some_and(|block| block != NESTED_BLOCK as u64) {
        return Err(format!("configuration: nested_block is {}", case.config["nested_block"]));
    }
    let double = ours.double();
    let Scales::Double { codes, nested, map, offset } = &double.scales else {
        return Err("scales are not in 8 bits".into());
    };
    same("absmax_codes", codes, &case.array("absmax_codes")?)?;
    case.array("nested_map")?.near("nested_map", &map[..], 0.0, 1e-6)?;
    case.array("nested_absmax")?.near("nested_absmax", nested, 0.0, 3e-7)?;
    case.array("nested_offset")?.near("nested_offset", &[*offset], 0.0, 3e-7)?;
    let scales: Vec<f32> = (0..double.scales.len()).map(|block| double.scales.at(block)).collect();
    case.array("absmax_restored")?.near("absmax_restored", &scales, 0.0, 1e-6)?;
    // With the scales of the case, bit by bit.
    let exact = FourBit { scales: Scales::Plain(case.array("absmax_restored")?.f32()), ..double };
    case.array("restored")?.near("restored", &exact.restored(), 0.0, 0.0)?;
    rounded(case, &exact)?;
    // And from the codes of the case, with its own map.
    let ours = given(case, w.values.len())?;
    let scales: Vec<f32> = (0..ours.scales.len()).map(|block| ours.scales.at(block)).collect();
    case.array("absmax_restored")?.near("absmax_restored from codes", &scales, 0.0, 1e-6)?;
    Ok("codes of values and scales are equal".into())
}

fn rounded(case: &Case, stored: &FourBit) -> Result<(), String> {
    if case.has("restored_bf16") {
        let ours: Vec<f32> = stored.restored().into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
        case.array("restored_bf16")?.near("restored_bf16", &ours, 0.0, 0.0)?;
    }
    Ok(())
}

/// A folder that transformers wrote: read as it is, restored, and written again.
fn folder(case: &Case) -> Outcome {
    let fail = |error: ModelError| error.to_string();
    let dir = case.path.with_file_name("model");
    let device = Device::default();
    let from = ModelFolder::open(&dir).map_err(fail)?;
    let ids = case.array("input_ids")?;
    let (batch, positions) = (ids.shape[0], ids.shape[1]);
    let expected = case.array("logits")?;
    let near = |model: &Llama, what: &str| -> Result<(), String> {
        let logits = model.logits(ids_tensor(&ids.i32(), batch, &device), None);
        expected.near(what, &host(logits.reshape([batch * positions, expected.shape[2]])), 1e-4, 0.0).map(|_| ())
    };
    let narrow = from.load_stored(MatrixStorage::Frozen(BaseStorage::File), &device).map_err(fail)?;
    let mut codes = 0;
    for (layer, block) in narrow.model.layers.iter().enumerate() {
        for (name, linear) in block.linears() {
            let path = format!("model.layers.{layer}.{name}.weight");
            let Linear::Dense(layer) = linear else { return Err("the layers are dense".into()) };
            let weight = layer.weight.val();
            codes += usize::from(packed(&weight).is_some());
            let name = format!("restored.{path}");
            if case.has(&name) {
                case.array(&name)?.near(&path, &host(ops::widened(weight).transpose()), 0.0, 0.0)?;
            }
        }
    }
    if codes == 0 {
        return Err("no weight is kept in codes".into());
    }
    near(&narrow, "logits")?;
    near(&from.load(&device).map_err(fail)?, "logits of restored weights")?;
    // Every tensor with codes comes back as it was.
    let again = std::env::temp_dir().join(format!("lowrank-nf4-{}", std::process::id()));
    std::fs::create_dir_all(&again).map_err(|error| error.to_string())?;
    let written = hub::save(&narrow, &from.config.extra, &again, u64::MAX).map_err(fail);
    let result = written.and_then(|()| same_codes(&dir, &again)).and_then(|()| {
        let from = ModelFolder::open(&again).map_err(fail)?;
        near(&from.load_stored(MatrixStorage::Frozen(BaseStorage::File), &device).map_err(fail)?, "logits read back")
    });
    let _ = std::fs::remove_dir_all(&again);
    result.map(|()| format!("{codes} weights in codes are equal, logits agree, codes are written as they were"))
}

fn same_codes(one: &Path, two: &Path) -> Result<(), String> {
    let read = |dir: &Path| std::fs::read(dir.join("model.safetensors")).map_err(|error| error.to_string());
    let (one, two) = (read(one)?, read(two)?);
    let open = |bytes| SafeTensors::deserialize(bytes).map_err(|error| error.to_string());
    let (one, two): (SafeTensors, SafeTensors) = (open(&one)?, open(&two)?);
    for (name, tensor) in one.tensors() {
        let other = two.tensor(&name).map_err(|_| format!("{name} is not written"))?;
        if name.contains(".quant_state.") {
            let parse = |bytes| serde_json::from_slice::<serde_json::Value>(bytes).map_err(|error| error.to_string());
            let (mut was, mut is) = (parse(tensor.data())?, parse(other.data())?);
            // The type before, which only says what the weights were.
            for state in [&mut was, &mut is] {
                state["dtype"].take();
            }
            if was != is {
                return Err(format!("{name} is {is} instead of {was}"));
            }
        } else if name.contains(".weight.") && tensor.data() != other.data() {
            return Err(format!("{name} has other bytes"));
        }
    }
    Ok(())
}

/// A layer on codes with an adapter beside it: forward, backward and merge.
fn products(case: &Case) -> Outcome {
    let (x, a, b) = (case.array("x")?, case.array("A")?, case.array("B")?);
    let shape = case.config["shape"].as_array().ok_or("configuration: shape")?;
    let side = |at: usize| shape.get(at).and_then(serde_json::Value::as_u64).ok_or("configuration: shape");
    let (d_out, d_in) = (side(0)? as usize, side(1)? as usize);
    let scale = case.number("scale")?;
    let device = Device::default();
    let stored = given(case, d_out * d_in)?;
    let matrix = PackedMatrix { shape: [d_in, d_out], transposed: true, codes: Codes::FourBit(stored.clone()) };
    let weight: Tensor<2> = Tensor::from_inner(carrier(&matrix, &device));
    let biased = |y: Tensor<2>| -> Result<Tensor<2>, String> {
        Ok(match case.has("bias") {
            true => y + Tensor::<1>::from_inner(case.array("bias")?.tensor()).unsqueeze(),
            false => y,
        })
    };
    let near = |name: &str, ours: Tensor<2>| -> Result<(), String> {
        let expected = case.array(name)?;
        expected.near(name, &host(ours), 1e-5 * expected.largest(), 1e-5).map(|_| ())
    };
    let learns = |array: &Array, transposed: bool| {
        let tensor = array.tensor::<2>();
        let tensor = if transposed { tensor.transpose() } else { tensor };
        Tensor::from_inner(tensor).require_grad()
    };
    let grad_output: Tensor<2> = Tensor::from_inner(case.array("grad_output")?.tensor());
    let input = learns(&x, false);
    let y = biased(ops::linear(input.clone(), weight.clone()))?;
    near("y_base", y.clone().inner())?;
    let mut grads = (y * grad_output.clone()).sum().backward();
    near("grad_x_base", input.grad_remove(&mut grads).ok_or("x has no gradient")?)?;

    let (input, a_in, b_out) = (learns(&x, false), learns(&a, true), learns(&b, true));
    let y = biased(ops::low_rank_linear(input.clone(), weight, a_in.clone(), b_out.clone(), scale))?;
    near("y", y.clone().inner())?;
    let mut grads = (y * grad_output).sum().backward();
    near("grad_x", input.grad_remove(&mut grads).ok_or("x has no gradient")?)?;
    near("grad_A", a_in.grad_remove(&mut grads).ok_or("A has no gradient")?.transpose())?;
    near("grad_B", b_out.grad_remove(&mut grads).ok_or("B has no gradient")?.transpose())?;

    let wide: Tensor<2> = Tensor::<1>::from_data(&stored.restored()[..], &device).reshape([d_out, d_in]);
    let merged = wide + b.tensor::<2>().matmul(a.tensor::<2>()).mul_scalar(scale);
    let ours: Vec<f32> = host(merged).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    let expected = case.array("merged_bf16")?;
    expected.near("merged_bf16", &ours, 0.0, 2f64.powi(-7))?;
    let others = ours.iter().zip(&expected.values).filter(|(ours, expected)| f64::from(**ours) != **expected).count();
    if others * 1000 > ours.len() {
        return Err(format!("merged_bf16: {others} of {} values differ by a place", ours.len()));
    }
    Ok("outputs, gradients and merged weight agree".into())
}
