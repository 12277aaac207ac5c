use super::*;

fn write(folder: &Path, vocab_size: u32, limit: u64, documents: &[Vec<u32>]) -> Manifest {
    let mut writer = ShardWriter::create(folder, vocab_size, 0, "t".into(), limit).unwrap();
    for d in documents {
        writer.push(d, 3 * d.len() as u64).unwrap();
    }
    writer.finish().unwrap()
}

fn documents(vocab_size: u32) -> Vec<Vec<u32>> {
    (1..60u32).map(|d| (0..d).map(|i| if i == 0 { 0 } else { (d * 7919 + i * 31) % vocab_size }).collect()).collect()
}

#[test]
fn what_is_written_is_read_across_files() {
    for vocab_size in [300, 1 << 16, (1 << 16) + 1, 200_000] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tokens");
        let documents = documents(vocab_size);
        let all: Vec<u32> = documents.concat();
        let manifest = write(&folder, vocab_size, 100, &documents);
        assert!(manifest.files.len() > 10);
        assert!(manifest.files.iter().all(|f| f.tokens <= 100));
        let shards = Shards::open(&folder).unwrap();
        shards.verify(&mut |_| ()).unwrap();
        assert_eq!(shards.len(), all.len() as u64);
        assert_eq!(shards.documents(), documents.len() as u64);
        assert_eq!(shards.text_bytes(), 3 * all.len() as u64);
        for (start, len) in [(0, all.len()), (99, 2), (100, 100), (50, 700), (all.len(), 0)] {
            let mut out = vec![0; len];
            shards.read(start as u64, &mut out).unwrap();
            assert_eq!(out, all[start..start + len]);
        }
        assert!(shards.read(all.len() as u64, &mut [0]).is_err());
        assert!(shards.read(u64::MAX, &mut [0, 0]).is_err());
    }
}

#[test]
fn damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tokens");
    write(&folder, 300, 100, &documents(300));
    let file = folder.join("tokens-00002.bin");
    let good = fs::read(&file).unwrap();

    fs::write(&file, &good[..good.len() - 1]).unwrap();
    let message = Shards::open(&folder).unwrap_err().to_string();
    assert!(message.contains("tokens-00002.bin") && message.contains("truncated"), "{message}");

    let mut flipped = good.clone();
    flipped[10] ^= 1;
    fs::write(&file, &flipped).unwrap();
    let message = Shards::open(&folder).unwrap().verify(&mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("tokens-00002.bin") && message.contains("SHA-256"), "{message}");

    let mut outside = good.clone();
    outside[21] = 0xff;
    fs::write(&file, &outside).unwrap();
    let error = Shards::open(&folder).unwrap().read(200, &mut [0; 50]).unwrap_err();
    assert!(matches!(error, DataError::OutOfVocabulary { position: 10, .. }), "{error}");

    fs::write(&file, &good).unwrap();
    let manifest = folder.join(MANIFEST);
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"separator\": 0", "\"separator\": 1")).unwrap();
    assert!(Shards::open(&folder).unwrap_err().is_input());
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(Shards::open(&folder).is_err());
    fs::remove_file(&manifest).unwrap();
    assert!(Shards::open(&folder).is_err());
}

#[test]
fn an_interrupted_writer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tokens");
    let mut writer = ShardWriter::create(&folder, 300, 0, "t".into(), 10).unwrap();
    writer.push(&[0; 25], 1).unwrap();
    // Simulates a kill: no destructor runs.
    std::mem::forget(writer);
    assert!(!folder.exists());
    write(&folder, 300, 10, &[vec![0, 1, 2]]);
    assert_eq!(Shards::open(&folder).unwrap().len(), 3);
    let mut writer = ShardWriter::create(&dir.path().join("other"), 300, 0, "t".into(), 10).unwrap();
    assert!(writer.push(&[0, 300], 1).is_err());
    drop(writer);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(matches!(ShardWriter::create(&folder, 300, 0, "t".into(), 10), Err(DataError::Exists { .. })));
}
