//! Every adapter structure on a LLaMA: written and read, merged and taken out again, switched, trained on.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Lora, Module};
use burn::optim::GradientsParams;
use burn::tensor::Device;
use lowrank_models::adapter::{
    AdapterConfig, Attach, Scaling, Targets, adapters_of, base_fingerprint, detach, linear_layers, merged,
    merged_with_unmerge_state, unmerged,
};
use lowrank_models::hub;
use lowrank_models::hub::peft::{Form, PeftFolder, adapter_dir, save};
use lowrank_models::{Llama, ModelError, ids_tensor};
use lowrank_optim::AdamWConfig;

mod small_adapters;
use small_adapters::{all, apart, base, base_on, config, moved, open};

/// Logits of a fixed batch.
fn logits(model: &Llama) -> Vec<f32> {
    let ids: Vec<i32> = (0..22).map(|i| (i * i * 7 + 3) % 61).collect();
    let device = Device::default();
    model.valid().logits(ids_tensor(&ids, 2, &device), None).into_data().try_into_vec().expect("f32")
}

/// Tensors of a file: shape and bytes by name.
type Written = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn put(dir: &Path, model: Llama) -> Llama {
    open(dir).attach(model).unwrap_or_else(|error| panic!("{error}")).0
}

fn refused(dir: &Path, model: Llama) -> String {
    PeftFolder::open(dir).and_then(|folder| folder.attach(model)).map(|_| ()).expect_err("a refusal").to_string()
}

#[test]
fn every_structure_survives_its_own_folder_bit_for_bit() {
    for config in all() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = moved(base(), &config);
        save(&model, "default", Form::Own, Some("the base"), dir.path()).unwrap();
        let folder = open(dir.path());
        assert_eq!(folder.warnings, Vec::<String>::new(), "{}", config.structure);
        assert_eq!((folder.config.seed, folder.base_model.as_deref()), (config.seed, Some("the base")));
        let again = put(dir.path(), base());
        assert_eq!(logits(&again), logits(&model), "{} {}", config.structure, config.init);
        // Written again, the files are the same.
        let second = tempfile::tempdir().expect("a folder");
        save(&again, "default", Form::Own, Some("the base"), second.path()).unwrap();
        for name in ["adapter_model.safetensors", "adapter_config.json"] {
            let read = |dir: &Path| std::fs::read(dir.join(name)).expect("a file");
            assert!(read(dir.path()) == read(second.path()), "{} {name}", config.structure);
        }
    }
}

#[test]
fn what_peft_can_read_says_the_same_there() {
    let mut written = Vec::new();
    for config in all() {
        let dir = tempfile::tempdir().expect("a folder");
        let model = moved(base(), &config);
        match save(&model, "default", Form::Peft, None, dir.path()) {
            Ok(()) => {
                let again = put(dir.path(), base());
                let apart = apart(&logits(&again), &logits(&model));
                assert!(apart < 1e-5, "{} {}: {apart}", config.structure, config.init);
                written.push(config.structure);
            }
            Err(error) => {
                assert!(error.to_string().contains("peft has no"), "{error}");
                assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{}", config.structure);
            }
        }
    }
    println!("{written:?}");
    assert!(written.iter().any(|name| name == "block-lora"), "{written:?}");
}

/// The plain LoRA of one that began as part of the weight: nothing was trained, so nothing is added.
#[test]
fn a_start_that_changes_the_base_is_converted() {
    for init in ["pissa", "olora"] {
        for root in [false, true] {
            let scaling = if root { Scaling::RootRank } else { Scaling::Rank };
            let config = AdapterConfig { init: init.into(), scaling: Some(scaling), ..config("lora").with_alpha(12.0) };
            let (model, _) = base().attach(Attach::new(config.clone())).unwrap();
            let dir = tempfile::tempdir().expect("a folder");
            save(&model, "default", Form::Peft, None, dir.path()).unwrap();
            let folder = open(dir.path());
            let alpha = if root { 12.0 * 2f64.sqrt() } else { 24.0 };
            assert_eq!((folder.config.rank, folder.config.alpha), (Some(16), Some(alpha)));
            assert_eq!(folder.config.init, "default");
            let layers = linear_layers(&base()).unwrap();
            let plain = merged(put(dir.path(), base())).unwrap();
            assert!(apart(&logits(&plain), &logits(&base())) < 1e-5);
            assert_ne!(base_fingerprint(&plain, &layers), 0);

            let patterns = AdapterConfig { rank_pattern: vec![("down_proj".into(), 4)], ..config };
            let model = moved(base(), &patterns);
            let again = tempfile::tempdir().expect("a folder");
            match save(&model, "default", Form::Peft, None, again.path()) {
                Ok(()) if !root => {
                    assert_eq!(open(again.path()).config.rank_pattern, [("down_proj".into(), 8)]);
                    assert!(apart(&logits(&put(again.path(), base())), &logits(&model)) < 1e-5);
                }
                Err(error) if root => assert!(error.to_string().contains("patterns"), "{error}"),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn merged_models_say_the_same_and_come_apart_again() {
    let mut joined = 0;
    for config in all() {
        let before = base();
        let model = moved(before.clone(), &config);
        let expected = logits(&model);
        let spec = config.entry().unwrap().spec;
        let (whole, unmerge_state) = match merged_with_unmerge_state(model.clone()) {
            Ok(done) => done,
            Err(error) => {
                let reason = spec.merges.err().unwrap_or("bias");
                assert!(error.to_string().contains(reason), "{}: {error}", spec.name);
                assert!(merged(model).is_err());
                continue;
            }
        };
        joined += 1;
        assert!(adapters_of(&whole).is_empty());
        let difference = apart(&logits(&whole), &expected);
        assert!(difference < 2e-5, "{}: {difference}", spec.name);
        assert_eq!(logits(&merged(model).unwrap()), logits(&whole));
        let apart_again = unmerged(whole, unmerge_state).unwrap();
        let difference = apart(&logits(&apart_again), &expected);
        assert!(difference < 5e-5, "{}: {difference}", spec.name);
        adapters_of(&apart_again)[0].switch(false);
        let difference = apart(&logits(&apart_again), &logits(&before));
        assert!(difference < 5e-5, "{}: {difference}", spec.name);
    }
    assert!(joined > 1);
}

#[test]
fn switched_off_or_taken_off_the_bits_are_those_of_the_base() {
    let expected = logits(&base());
    for config in all() {
        let model = moved(base(), &config);
        assert_ne!(logits(&model), expected, "{}", config.structure);
        let control = adapters_of(&model).remove(0);
        control.switch(false);
        assert_eq!(logits(&model), expected, "{}", config.structure);
        // What is off is not merged.
        assert_eq!(logits(&merged(model.clone()).unwrap()), expected, "{}", config.structure);
        control.switch(true);
        assert_eq!(logits(&detach(model, "default").unwrap()), expected, "{}", config.structure);
        let (fresh, _) = match base().attach(Attach::new(config.clone())) {
            Ok(attached) => attached,
            // Starts from gradients have none here.
            Err(error) if error.to_string().contains("gradients") => continue,
            Err(error) => panic!("{}: {error}", config.structure),
        };
        if !config.initialisation().is_some_and(|init| init.changes_output) {
            assert!(apart(&logits(&fresh), &expected) < 2e-3, "{}", config.structure);
        }
    }
}

#[test]
fn two_adapters_go_through_one_folder_and_stand_on_each_other() {
    let dir = tempfile::tempdir().expect("a folder");
    let names = ["default", "style"];
    let configs =
        [config("lora"), AdapterConfig { targets: Targets::parse("q_proj,down_proj"), ..config("block-lora") }];
    let both = names.iter().zip(&configs).fold(base(), |model, (name, config)| {
        moved(model, &AdapterConfig { name: name.to_string(), ..config.clone() })
    });
    for name in names {
        save(&both, name, Form::Own, None, dir.path()).unwrap();
    }
    assert!(dir.path().join("style/adapter_config.json").exists());
    let again = names
        .iter()
        .fold(base(), |model, name| PeftFolder::open_named(dir.path(), name).unwrap().attach(model).unwrap().0);
    assert_eq!(logits(&again), logits(&both));
    let alone: Vec<Vec<f32>> =
        names.iter().map(|name| logits(&put(&adapter_dir(dir.path(), name).unwrap(), base()))).collect();
    let [first, second] = [0, 1].map(|place| adapters_of(&again)[place].clone());
    for (on, expected) in [([true, false], &alone[0]), ([false, true], &alone[1]), ([false, false], &logits(&base()))] {
        first.switch(on[0]);
        second.switch(on[1]);
        // Beside another adapter the same sums are taken in another order.
        assert!(apart(&logits(&again), expected) < 1e-5, "{on:?}");
    }
    assert_eq!(logits(&again), logits(&base()), "both off");
    first.switch(true);
    second.switch(true);
    assert!(apart(&logits(&merged(again.clone()).unwrap()), &logits(&both)) < 1e-5);
    let taken = PeftFolder::open_named(dir.path(), "style").unwrap().attach(again).map(|_| ()).unwrap_err();
    assert!(taken.to_string().contains("of this name"), "{taken}");
    assert!(adapter_dir(dir.path(), "../up").is_err() && adapter_dir(dir.path(), "").is_err());
}

#[test]
fn an_adapter_of_a_folder_is_trained_on() {
    let dir = tempfile::tempdir().expect("a folder");
    save(&moved(base(), &config("lora")), "default", Form::Own, None, dir.path()).unwrap();
    let device = Device::default().autodiff();
    let tracked = base_on(&device);
    let (mut model, report) = open(dir.path()).attach(tracked).unwrap();
    let before = logits(&model);
    let ids = || ids_tensor(&[3, 1, 4, 1, 5, 9, 2, 6], 2, &device.clone().inner());
    let loss = model.loss_sum(ids(), ids(), None);
    let grads = GradientsParams::from_grads(loss.backward(), &model);
    assert_eq!(grads.len(), 2 * report.layers.len(), "the two factors of each layer have a gradient, and nothing else");
    model = AdamWConfig::new().init().step(1e-3, model, grads);
    assert_ne!(logits(&model), before);
    report.control.switch(false);
    assert_eq!(logits(&model), logits(&base()));
}

#[test]
fn other_weights_below_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    save(&moved(base(), &config("lora")), "default", Form::Peft, Some("some/model"), dir.path()).unwrap();
    let other = Llama::random(base().config(), 6, &Device::default()).unwrap();
    let message = refused(dir.path(), other);
    assert!(message.contains("other base weights") && message.contains("some/model"), "{message}");
    // A merged model is another base as well.
    let message = refused(dir.path(), merged(put(dir.path(), base())).unwrap());
    assert!(message.contains("other base weights"), "{message}");
    // Adapters that stand below do not change the base.
    let lower = moved(base(), &AdapterConfig { name: "lower".into(), ..config("lora") });
    put(dir.path(), lower);
    let (whole, unmerge_state) = merged_with_unmerge_state(put(dir.path(), base())).unwrap();
    let message =
        unmerged(merged(moved(whole, &config("lora"))).unwrap(), unmerge_state).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("changed since it was merged"), "{message}");
}

#[test]
fn weights_that_are_not_finite_are_not_merged() {
    let dir = tempfile::tempdir().expect("a folder");
    save(&moved(base(), &config("lora")), "default", Form::Own, None, dir.path()).unwrap();
    let file = dir.path().join("adapter_model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    let message = merged(put(dir.path(), base())).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("not finite") && message.contains("proj"), "{message}");
}

/// Tensors of a folder by name, changed and written back.
#[test]
fn a_model_with_adapters_is_no_model_folder() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |model: &Llama, weight: &str| {
        let error = hub::save(model, &serde_json::Map::new(), dir.path(), u64::MAX).unwrap_err();
        assert!(matches!(&error, ModelError::Adapted { path } if path == weight), "{error}");
        assert!(error.to_string().contains("merge it first, or save the adapter"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was written");
    };
    let model = moved(base(), &config("lora").with_targets(Targets::parse("k_proj")));
    refused(&model, "model.layers.0.self_attn.k_proj.weight");
    adapters_of(&model)[0].switch(false);
    refused(&model, "model.layers.0.self_attn.k_proj.weight");
    refused(&base().apply_lora(Lora::new(2, 4.0)), "model.embed_tokens.weight");
    hub::save(&merged(model).unwrap(), &serde_json::Map::new(), dir.path(), u64::MAX).unwrap();
}

fn edit(dir: &Path, change: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>)) {
    let file = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> =
        read.iter().map(|(name, view)| (name.to_string(), (view.shape().to_vec(), view.data().to_vec()))).collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (shape, data))| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap())
    });
    safetensors::serialize_to_file(views, None, &file).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let fresh = || {
        let dir = tempfile::tempdir().expect("a folder");
        let config = AdapterConfig { targets: Targets::parse("q_proj,v_proj"), ..config("lora") };
        save(&moved(base(), &config), "default", Form::Peft, None, dir.path()).unwrap();
        dir
    };
    let layer = "base_model.model.model.layers.1.self_attn.q_proj";
    let (a, b) = (format!("{layer}.lora_A.weight"), format!("{layer}.lora_B.weight"));
    let check = |change: &dyn Fn(&mut Written), says: &[&str]| {
        let dir = fresh();
        edit(dir.path(), |tensors| change(tensors));
        let message = refused(dir.path(), base());
        says.iter().for_each(|part| assert!(message.contains(part), "{part} is not in {message}"));
    };
    check(&|tensors| drop(tensors.remove(&a)), &[&a, "missing"]);
    check(
        &|tensors| {
            let taken = tensors.remove(&a).unwrap();
            tensors.insert(format!("{layer}.lora_C.weight"), taken);
        },
        &[&a, "missing", "lora_C", "does not fit"],
    );
    check(&|tensors| tensors.retain(|name, _| !name.starts_with(layer)), &[layer, "missing"]);
    check(&|tensors| tensors.get_mut(&b).unwrap().0 = vec![16, 16], &[&b, "[16, 16]", "[32, 8]"]);
    check(
        &|tensors| {
            for name in [&a, &b] {
                let copy = tensors[name].clone();
                tensors.insert(name.replace("q_proj", "o_proj"), copy);
            }
        },
        &["o_proj", "does not adapt"],
    );
    check(
        &|tensors| drop(tensors.insert("base_model.model.other.weight".into(), (vec![1], vec![0; 4]))),
        &["other.weight", "has no place"],
    );
    check(
        &|tensors| {
            let copy = tensors[&a].clone();
            tensors.insert(format!("{layer}.lora_A.default.weight"), copy);
        },
        &["lora_A", "twice"],
    );

    // The name of an adapter inside the names of its tensors is passed over.
    let dir = fresh();
    let expected = logits(&put(dir.path(), base()));
    edit(dir.path(), |tensors| {
        *tensors = std::mem::take(tensors)
            .into_iter()
            .map(|(name, tensor)| (name.replace(".weight", ".some_name.weight"), tensor))
            .collect();
    });
    assert_eq!(logits(&put(dir.path(), base())), expected);

    let dir = fresh();
    std::fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("adapter_model.bin")).unwrap();
    assert!(refused(dir.path(), base()).contains("pickle"));
    std::fs::remove_file(dir.path().join("adapter_model.bin")).unwrap();
    assert!(refused(dir.path(), base()).contains("adapter_model.safetensors"));
}

#[test]
fn layers_are_named_one_by_one_where_peft_has_no_words() {
    let chosen = AdapterConfig {
        exclude: Some(Targets::parse("k_proj,mlp.up_proj")),
        layers: Some(vec![1]),
        rank_pattern: vec![("q_proj|v_proj".into(), 4), ("q_proj".into(), 2)],
        ..config("lora")
    };
    let model = moved(base(), &chosen);
    let dir = tempfile::tempdir().expect("a folder");
    save(&model, "default", Form::Peft, None, dir.path()).unwrap();
    let text = std::fs::read_to_string(dir.path().join("adapter_config.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let targets: Vec<&str> =
        json["target_modules"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(targets.len(), 5, "{targets:?}");
    assert!(targets.iter().all(|name| name.starts_with("model.layers.1.")));
    // The first pattern that matches counts; alpha is that of the rank.
    assert!(text.find("q_proj|v_proj") < text.find("\"q_proj\""), "{text}");
    assert_eq!(logits(&put(dir.path(), base())), logits(&model));
    let keys: Vec<&str> = text.lines().filter(|line| line.starts_with("  \"")).collect();
    assert!(keys.is_sorted(), "{text}");
}
