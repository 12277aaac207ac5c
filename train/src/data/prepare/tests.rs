use super::*;

fn corpus(dir: &Path, documents: usize) -> PrepareOptions {
    let text = dir.join("text");
    std::fs::create_dir_all(&text).unwrap();
    for number in 0..documents {
        std::fs::write(
            text.join(format!("{number:03}.txt")),
            format!("document {number} says hello to {}", number * 7),
        )
        .unwrap();
    }
    PrepareOptions {
        source: Source { paths: vec![text], format: Format::Auto, field: "text".into() },
        tokenizer: TokenizerChoice::Train(270),
        held_out: HeldOut::Fraction(0.2),
        seed: 1,
    }
}

fn all(shards: &Shards) -> Vec<u32> {
    let mut tokens = vec![0; shards.len() as usize];
    shards.read(0, &mut tokens).unwrap();
    tokens
}

#[test]
fn the_second_time_is_the_cache_and_changed_text_is_prepared_anew() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 60);
    let cache = dir.path().join("cache");
    let mut calls = 0;
    let first = prepare(&options, &cache, &mut |_| calls += 1).unwrap();
    assert!(calls > 0);
    calls = 0;
    let second = prepare(&options, &cache, &mut |_| calls += 1).unwrap();
    assert_eq!((calls, all(&first.train)), (0, all(&second.train)));
    std::fs::write(dir.path().join("text/new.txt"), "one more").unwrap();
    assert_ne!(prepare(&options, &cache, &mut |_| ()).unwrap().dir, first.dir);
    assert!(
        std::fs::read_dir(&cache)
            .unwrap()
            .all(|entry| { !entry.unwrap().file_name().to_string_lossy().starts_with('.') })
    );
    // A folder of token files is itself data.
    let source = Source { paths: vec![first.dir.clone()], ..options.source.clone() };
    let direct = prepare(&PrepareOptions { source, ..options }, &cache, &mut |_| ()).unwrap();
    assert_eq!(all(&direct.validation), all(&first.validation));
}

#[test]
fn every_document_is_on_one_side() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 100);
    let whole = prepare(&options, &dir.path().join("cache"), &mut |_| ()).unwrap();
    assert_eq!(whole.train.documents() + whole.validation.documents(), 100);
    assert!((5..40).contains(&whole.validation.documents()));
    assert!(whole.facts.gzip_bits_per_byte > 0.5 && whole.facts.gzip_bits_per_byte < 8.0);
}

#[test]
fn a_single_document_serves_both_sides_and_no_text_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let options = PrepareOptions { tokenizer: TokenizerChoice::Bytes, ..corpus(dir.path(), 1) };
    let file = dir.path().join("text/000.txt");
    let text: String = (0..100).map(|line| format!("line {line}\n")).collect();
    std::fs::write(&file, &text).unwrap();
    let cache = dir.path().join("cache");
    let prepared = prepare(&options, &cache, &mut |_| ()).unwrap();
    let sides = [&prepared.train, &prepared.validation].map(|side| prepared.tokenizer.decode(&all(side)).unwrap());
    assert_eq!(sides.concat(), text);
    assert!(sides[1].starts_with("line 80\n"));
    std::fs::write(&file, "").unwrap();
    let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("1 empty documents"), "{message}");
}

#[test]
fn other_data_may_be_held_out_and_all_may_be_measured() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 30);
    let other = dir.path().join("other.jsonl");
    std::fs::write(&other, "{\"text\": \"measured\"}\n{\"text\": \"twice\"}").unwrap();
    let source = Source { paths: vec![other], ..options.source.clone() };
    let cache = dir.path().join("cache");
    let with = |held_out: HeldOut| {
        let options = PrepareOptions { held_out, tokenizer: TokenizerChoice::Bytes, ..options.clone() };
        let prepared = prepare(&options, &cache, &mut |_| ()).unwrap();
        (prepared.train.documents(), prepared.validation.documents())
    };
    assert_eq!(with(HeldOut::Source(source)), (30, 2));
    assert_eq!(with(HeldOut::Everything), (0, 30));
}

#[cfg(unix)]
#[test]
fn a_changed_file_of_equal_size_and_time_is_prepared_again() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 30);
    let (cache, file) = (dir.path().join("cache"), dir.path().join("text/003.txt"));
    let first = prepare(&options, &cache, &mut |_| ()).unwrap();
    let (text, time) = (std::fs::read_to_string(&file).unwrap(), std::fs::metadata(&file).unwrap().modified().unwrap());
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(&file, text.replace("hello", "HELLO")).unwrap();
    File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    let second = prepare(&options, &cache, &mut |_| ()).unwrap();
    assert_ne!(first.dir, second.dir);
}

#[test]
fn what_a_killed_process_left_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 20);
    let cache = dir.path().join("cache");
    let place = cache.join(&key(&options).unwrap()[..16]);
    std::fs::create_dir_all(partial_of(&place).join("train")).unwrap();
    std::fs::write(partial_of(&place).join("train/tokens-00000.bin"), "half").unwrap();
    let prepared = prepare(&options, &cache, &mut |_| ()).unwrap();
    prepared.train.verify(&mut |_| ()).unwrap();
    assert_eq!((&prepared.dir, std::fs::read_dir(&cache).unwrap().count()), (&place, 1));
}

#[test]
fn several_may_prepare_the_same_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let options = corpus(dir.path(), 60);
    let cache = dir.path().join("cache");
    let tokens = || all(&prepare(&options, &cache, &mut |_| ()).unwrap().train);
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..3).map(|_| scope.spawn(tokens)).collect();
        let here = tokens();
        assert!(others.into_iter().all(|other| other.join().unwrap() == here));
    });
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 1);
}

#[test]
fn token_files_go_with_their_own_tokenizer_and_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = corpus(dir.path(), 60);
    let out = dir.path().join("tokens");
    tokenize(&options, &out, &mut |_| ()).unwrap();
    assert!(matches!(tokenize(&options, &out, &mut |_| ()), Err(DataError::Exists { .. })));
    options.source.paths.push(out.clone());
    let cache = dir.path().join("cache");
    let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("give it alone"), "{message}");
    options.source.paths.remove(0);
    options.tokenizer = TokenizerChoice::File(out.join("tokenizer.json"));
    prepare(&options, &cache, &mut |_| ()).unwrap();
    options.tokenizer = TokenizerChoice::Bytes;
    let message = prepare(&options, &cache, &mut |_| ()).unwrap_err().to_string();
    assert!(message.contains("another tokenizer"), "{message}");
    assert!(tokenize(&options, &dir.path().join("other"), &mut |_| ()).is_err());
    assert!(!cache.exists());
}
