// Decodes prompts with llama.cpp, alone or with a drafter: node-llama-cpp's own predictor, or one that always drafts
// gamma tokens. Run by Node in the serving environment.
// stdin: {"target", "drafter" or null, "predictor": "own"|"fixed", "num_speculative_tokens", "prompts", "max_new_tokens", "stop_ids"}
// stdout, last line: [{"tokens", "target_calls", "accepted", "refuted"}, ...]
import {text} from "node:stream/consumers";
import {DraftSequenceTokenPredictor, getLlama, TokenPredictor} from "node-llama-cpp";

const asked = JSON.parse(await text(process.stdin));
const gamma = asked.num_speculative_tokens;
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});

// The draft's tokens, exactly gamma of them whenever the target is about to be called.
class FixedPredictor extends TokenPredictor {
    constructor(sequence) {
        super();
        this.sequence = sequence;
        this.calls = 0;
    }
    reset({stateTokens}) {
        this.text = stateTokens.slice();
        this.calls = 0;
    }
    pushTokens(tokens) {
        this.text.push(...tokens);
    }
    async predictTokens() {
        this.calls += 1;
        await this.sequence.adaptStateToTokens(this.text.slice(0, -1), false);
        const missing = this.text.slice(this.sequence.nextTokenIndex);
        const drafted = [];
        for await (const token of this.sequence.evaluate(missing, {temperature: 0, yieldEogToken: true})) {
            drafted.push(token);
            if (drafted.length === gamma)
                break;
        }
        return drafted;
    }
}

// By default the cache and flash attention are in half precision, which decides near ties of the argmax otherwise.
const exact = {flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};

async function load(path) {
    const model = await llama.loadModel({modelPath: path});
    return (await model.createContext({contextSize: 512, batchSize: 512, threads: 1, ...exact}));
}

const target = await load(asked.target);
const drafter = asked.drafter ? await load(asked.drafter) : null;
const found = [];
for (const prompt of asked.prompts) {
    let predictor;
    if (drafter && asked.predictor === "fixed")
        predictor = new FixedPredictor(drafter.getSequence());
    else if (drafter)
        predictor = new DraftSequenceTokenPredictor(drafter.getSequence(), {minTokens: gamma, maxTokens: gamma, minConfidence: 0});
    const sequence = target.getSequence(predictor ? {tokenPredictor: predictor} : {});
    const tokens = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        if (tokens.length === asked.max_new_tokens || asked.stop_ids.includes(token))
            break;
    }
    const counted = sequence.tokenPredictions;
    found.push({tokens, target_calls: predictor?.calls ?? tokens.length, accepted: counted.used, refuted: counted.refuted});
    sequence.dispose();
    (predictor?.sequence ?? predictor?.draftSequence)?.dispose();
}
console.log(JSON.stringify(found));
process.exit(0);
