//! Adapter folders as data: factors and scale of every layer, without a model.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_models::adapter::{NamePattern, each_adapter};
use lowrank_models::hub::peft::{Form, PeftFolder, save};

mod small_adapters;
use small_adapters::{all, apart, base, moved, open};

#[test]
fn updates_that_are_products_are_read_without_a_model() {
    for config in all() {
        let name = format!("{} {}", config.structure, config.init);
        let model = moved(base(), &config);
        let dir = tempfile::tempdir().expect("a folder");
        save(&model, "default", Form::Own, None, dir.path()).expect("a folder that can be written");
        let mut products = BTreeMap::new();
        each_adapter(&model, |path, adapter| {
            if let Some([a, b]) = adapter.stack[0].change() {
                products.insert(path.to_string(), a.matmul(b).into_data().try_into_vec::<f32>().expect("f32"));
            }
        });
        let layers: Result<Vec<_>, _> = open(dir.path()).factors().and_then(Iterator::collect);
        match (layers, products.is_empty()) {
            (Ok(layers), false) => {
                assert_eq!(layers.len(), products.len(), "{name}");
                for layer in layers {
                    let product: Vec<f32> = layer.factors.product().into_data().try_into_vec().expect("f32");
                    assert!(apart(&product, &products[&layer.path]) < 1e-6, "{name}: {}", layer.path);
                }
            }
            // peft's layout does not hold the sides of the layers.
            (Err(error), false) if config.structure == "vera" => {
                assert!(error.to_string().contains("attach it to its model"), "{error}");
            }
            (Err(error), true) => assert!(error.to_string().contains("model"), "{name}: {error}"),
            (Ok(_), true) => panic!("{name} has no product, and factors were read"),
            (Err(error), false) => panic!("{name}: {error}"),
        }
    }
}

/// The folders below the golden cases that hold an adapter.
fn adapter_folders() -> Vec<std::path::PathBuf> {
    let mut open = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")];
    let mut found = Vec::new();
    while let Some(dir) = open.pop() {
        let entries = std::fs::read_dir(&dir).expect("a folder").map(|entry| entry.expect("an entry").path());
        open.extend(entries.filter(|path| path.is_dir()));
        if dir.join("adapter_config.json").exists() {
            found.push(dir);
        }
    }
    found.sort();
    found
}

#[test]
fn every_adapter_folder_of_the_golden_cases_is_read_without_a_model_or_refused_with_the_cure() {
    let (mut read, mut refused) = (Vec::new(), Vec::new());
    for dir in adapter_folders() {
        let name = dir.file_name().expect("a name").to_string_lossy().to_string();
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).expect("a file")).expect("JSON");
        let bytes = std::fs::read(dir.join("adapter_model.safetensors")).expect("a file");
        if json["peft_type"] == "XLORA" {
            let error = PeftFolder::open(&dir).expect_err("a mixture is no adapter").to_string();
            assert!(error.contains("one of its experts"), "{error}");
            continue;
        }
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
        let layers: Result<Vec<_>, _> = open(&dir).factors().and_then(Iterator::collect);
        let layers = match layers {
            Ok(layers) => layers,
            Err(error) => {
                assert!(error.to_string().contains("attach it to its model"), "{name}: {error}");
                refused.push(name);
                continue;
            }
        };
        if json["peft_type"] == "ADALORA" {
            // The values between the factors are multiplied into one of them, and layers have the rank that is left.
            assert_eq!(file.len(), 3 * layers.len(), "{name}");
            let ranks: usize = layers.iter().map(|layer| layer.factors.a.dims()[1]).sum();
            let masks = json["rank_pattern"].as_object().into_iter().flat_map(|masks| masks.values());
            let kept = masks
                .flat_map(|mask| mask.as_array().into_iter().flatten())
                .filter(|flag| flag.as_bool() == Some(true));
            assert_eq!(ranks, kept.count(), "{name}");
            continue;
        }
        // Copies of base weights belong to no layer of the adapter.
        let own = file.names().into_iter().filter(|name| !name.ends_with(".base_layer.weight")).count();
        assert_eq!(own, 2 * layers.len(), "{name}");
        for layer in layers {
            let rank = layer.factors.a.dims()[1] as f64;
            let patterns = json["alpha_pattern"].as_object().into_iter().flatten();
            let own = patterns.filter(|(key, _)| {
                NamePattern::new(key, "rank_pattern").and_then(|own| own.matches(&layer.path)).unwrap()
            });
            let mut alphas: Vec<f64> = own.filter_map(|(_, alpha)| alpha.as_f64()).collect();
            if alphas.is_empty() {
                alphas.extend(json["lora_alpha"].as_f64());
            }
            let divisor = if json["use_rslora"] == true { rank.sqrt() } else { rank };
            let scaled = |alpha: &f64| (layer.factors.scale - alpha / divisor).abs() < 1e-12;
            assert!(alphas.iter().any(scaled), "{name}: {}", layer.path);
            for (factor, letter) in [(layer.factors.a, "A"), (layer.factors.b, "B")] {
                let named = |field: String| file.tensor(&format!("base_model.model.{}.{field}", layer.path));
                let tensor = named(format!("lora_{letter}.weight"));
                let tensor = tensor.or_else(|_| named(format!("lora_embedding_{letter}"))).expect("a tensor");
                let data = factor.transpose().into_data();
                assert_eq!(data.shape().as_slice(), tensor.shape(), "{name}: {}", layer.path);
                assert_eq!(data.as_bytes(), tensor.data(), "{name}: {}", layer.path);
            }
        }
        read.push(name);
    }
    assert!(read.len() >= 6 && !refused.is_empty(), "read {read:?}, refused {refused:?}");
}
