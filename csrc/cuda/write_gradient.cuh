// Writes a row's gradient from its coefficients, element by element, and zeros where it has none.
#pragma once

#include "row_finish.cuh"

namespace papo {
namespace cuda {

// ---- elements -----------------------------------------------------------------------------------

// For kGeneral x must be at least Scaling::low.
template <GradMode kMode>
PAPO_DEVICE float element_grad(float x, const ElementGrad& g, const Scaling& s) {
  if constexpr (kMode == GradMode::kCareful) {
    const float capped = s.capped(x);
    const float e = machine::exp2_fast((capped - g.m) * s.unit);
    const float from = machine::max_nan((capped - g.center) * s.unit, kFloor);
    const float du = e * fmaf(e, fmaf(g.b1, from, g.b0), fmaf(g.a1, from, g.a0));
    if (s.softcap == 0.0f || x == -infinity<float>()) return du;
    return du * softcap_slope(tanh_of(x * s.inv_softcap));
  } else if constexpr (kMode == GradMode::kGeneral) {
    const float e = machine::exp2_fast(fmaf(x, s.unit, -g.m));
    const float from = fmaf(x, s.unit, -g.center);
    return e * fmaf(e, fmaf(g.b1, from, g.b0), fmaf(g.a1, from, g.a0));
  } else {
    return g.a0 * machine::exp2_fast(fmaf(x, s.unit, -g.m));
  }
}

PAPO_DEVICE float element_grad(float x, const ElementGrad& g, const Scaling& s) {
  switch (g.mode) {
    case GradMode::kScaledExp:
      return element_grad<GradMode::kScaledExp>(x, g, s);
    case GradMode::kGeneral:
      return element_grad<GradMode::kGeneral>(machine::max_nan(x, s.low), g, s);
    default:
      return element_grad<GradMode::kCareful>(x, g, s);
  }
}

// ---- words --------------------------------------------------------------------------------------

// How many words of logits one word of the gradient needs.
template <typename In, typename Out>
constexpr int kWordsIn = kPerWord<Out> / kPerWord<In>;

template <typename In, typename Out>
struct WordIn {
  Word w[kWordsIn<In, Out>];
};

template <GradMode kMode, typename In, typename Out>
PAPO_DEVICE Word word_grad(const WordIn<In, Out>& in, const ElementGrad& g, const Scaling& s) {
  Word out;
#pragma unroll
  for (int i = 0; i < Out::kPairs; ++i) {
    const Word& word = in.w[i / In::kPairs];
    const Pair x = kMode == GradMode::kGeneral ? raised_pair<In>(word, i % In::kPairs, s.low_bits)
                                               : pair<In>(word, i % In::kPairs);
    set_pair<Out>(out, i, {element_grad<kMode>(x.lo, g, s), element_grad<kMode>(x.hi, g, s)});
  }
  return out;
}

// Writes kWords words of the gradient at the aligned `out`: first, first + step, .... Their loads
// are in flight together.
template <GradMode kMode, bool kAligned, int kWords, typename In, typename Out, typename Row>
PAPO_DEVICE void write_some(const Row& row, int first, int step, char* out, const ElementGrad& g,
                            const Scaling& s) {
  constexpr int kIn = kWordsIn<In, Out>;
  WordIn<In, Out> in[kWords];
#pragma unroll
  for (int u = 0; u < kWords; ++u) {
    const int i = first + u * step;
#pragma unroll
    for (int k = 0; k < kIn; ++k) {
      in[u].w[k] = kAligned ? row.aligned_word(kIn * i + k) : row.word(kIn * i + k);
    }
  }
#pragma unroll
  for (int u = 0; u < kWords; ++u) {
    machine::store_global(out + static_cast<int64_t>(first + u * step) * kWordBytes,
                          word_grad<kMode, In, Out>(in[u], g, s));
  }
}

template <GradMode kMode, bool kAligned, int kUnroll, typename In, typename Out, typename Row>
PAPO_DEVICE void write_words(const Row& row, int words, char* out, const ElementGrad& g,
                             const Scaling& s, Share share) {
  const int step = share.threads;
  int i = share.thread;
#pragma unroll 1
  for (; i + (kUnroll - 1) * step < words; i += kUnroll * step) {
    write_some<kMode, kAligned, kUnroll, In, Out>(row, i, step, out, g, s);
  }
  if constexpr (kUnroll > 2) {
    if (i + step < words) {
      write_some<kMode, kAligned, 2, In, Out>(row, i, step, out, g, s);
      i += 2 * step;
    }
  }
  if constexpr (kUnroll > 1) {
    if (i < words) write_some<kMode, kAligned, 1, In, Out>(row, i, step, out, g, s);
  }
}

template <GradMode kMode, typename In, typename Out, typename Row>
PAPO_DEVICE void write_words(const Row& row, int words, char* out, const ElementGrad& g,
                             const Scaling& s, Share share) {
  if (row.aligned()) {
    constexpr int kUnroll = Row::kUnroll / kWordsIn<In, Out>;
    write_words<kMode, true, kUnroll, In, Out>(row, words, out, g, s, share);
  } else {
    write_words<kMode, false, 1, In, Out>(row, words, out, g, s, share);
  }
}

// Writes the gradient of the first `count` elements of `row` to `out`. All stores but those at a
// ragged end have 16 bytes. `target` is the sampled token's place, which may lie outside the run.
template <typename In, typename Out, typename Row>
PAPO_DEVICE void write_gradient(const Row& row, int count, char* out, int target,
                                const ElementGrad& g, const Scaling& s, Share share) {
  const Walk walk = make_walk(reinterpret_cast<uintptr_t>(out), count, Out::kBytes);
  if (share.thread < walk.ends()) {
    const int i = walk.end_place(share.thread, count);
    const float d = i == target ? g.target : element_grad(row.element(i), g, s);
    store_element<Out>(out + static_cast<int64_t>(i) * Out::kBytes, d);
  }
  const Row body = row.from(walk.head);
  out += static_cast<int64_t>(walk.head) * Out::kBytes;
  target -= walk.head;
  switch (g.mode) {
    case GradMode::kScaledExp:
      write_words<GradMode::kScaledExp, In, Out>(body, walk.words, out, g, s, share);
      break;
    case GradMode::kGeneral:
      write_words<GradMode::kGeneral, In, Out>(body, walk.words, out, g, s, share);
      break;
    default:
      write_words<GradMode::kCareful, false, 1, In, Out>(body, walk.words, out, g, s, share);
  }
  // Over a word that this same thread has written.
  if (target >= 0 && target < walk.words * kPerWord<Out> &&
      target / kPerWord<Out> % share.threads == share.thread) {
    store_element<Out>(out + static_cast<int64_t>(target) * Out::kBytes, g.target);
  }
}

// ---- zeros --------------------------------------------------------------------------------------

template <typename Out>
PAPO_DEVICE void write_zeros(char* out, int count, Share share) {
  const Walk walk = make_walk(reinterpret_cast<uintptr_t>(out), count, Out::kBytes);
  if (share.thread < walk.ends()) {
    const int i = walk.end_place(share.thread, count);
    store_element<Out>(out + static_cast<int64_t>(i) * Out::kBytes, 0.0f);
  }
  out += static_cast<int64_t>(walk.head) * Out::kBytes;
  for (int i = share.thread; i < walk.words; i += share.threads) {
    machine::store_global(out + static_cast<int64_t>(i) * kWordBytes, Word{});
  }
}

// Writes zeros to the columns [begin, cols) of row i of dlogits: to part `part` of `parts`.
template <typename Out>
PAPO_DEVICE void write_zero_columns(const RowsCall& call, int64_t i, int64_t begin, int part,
                                    int parts, Share share) {
  if (begin >= call.dlogits.cols) return;
  const Span span = span_between(begin, call.dlogits.cols, part, parts, kPerWord<Out>);
  if (span.count > 0) {
    write_zeros<Out>(element_at<Out>(call.dlogits, i, span.begin), span.count, share);
  }
}

}  // namespace cuda
}  // namespace papo
