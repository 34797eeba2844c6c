/* The router: which experts a token goes to, and where its rows stand among theirs. */
#ifndef MF_ROUTE_H
#define MF_ROUTE_H

#include <stdint.h>

/* Letters: T tokens, D model width, E experts, K experts per token. */
struct mf_route {
    int64_t num_experts, top_k; /* E and K */
    int32_t *chosen;            /* [T, K] experts, best first, equal ones in order */
    float *shares;              /* [T, K] */
    int64_t *places;            /* [T, K] rows among the T * K that are sorted by expert */
    int64_t *starts;            /* [E + 1] first row of each expert */
};

/* Choose for one normed token x [D]; gate is [E, D], scores has room for E. */
void mf_route_token(const struct mf_route *route, const float *gate, const float *x, int64_t d,
                    int64_t token, float *scores);

/* Fill places and starts, when all tokens have chosen. One thread. */
void mf_route_sort(const struct mf_route *route, int64_t t);

#endif
